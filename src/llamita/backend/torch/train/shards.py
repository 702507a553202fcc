"""A checkpoint in parts: each process writes what it holds, and any number of processes reads it again.

Stands on torch.distributed.checkpoint, whose files know which slice of which array they hold; names are canonical.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from llamita.backend.interface import Saving
from llamita.backend.torch.model.weights import host_from_tensor
from llamita.backend.torch.train.group import TorchGroup, others_present
from llamita.model.host_array import HostArray

WEIGHTS, OPTIMIZER, UPDATES = "weights.", "optimizer.", "optimizer.t"


def named(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], updates: int) -> dict[str, Tensor]:
    """Returns weights and the optimiser's state as a checkpoint names them."""
    return {
        **{WEIGHTS + name: tensor for name, tensor in weights.items()},
        **{OPTIMIZER + name: tensor for name, tensor in moments.items()},
        UPDATES: torch.tensor([updates]),
    }


def save(tensors: dict[str, Tensor], directory: Path, group: TorchGroup) -> Saving:
    """Begins to write the parts that this process holds; the numbers are those of now, whatever follows."""
    with others_present():
        saving: Saving = dcp.async_save(  # type: ignore[assignment] # a future, where nothing else is asked for
            tensors, checkpoint_id=directory, process_group=group.checkpoints
        )
        return saving


def load(tensors: dict[str, Tensor], directory: Path, group: TorchGroup | None) -> int:
    """Gives the tensors their saved values, in place, and returns the number of updates made; alone without a group.

    ValueError, naming them, for tensors that the checkpoint lacks or that have another shape there.
    """
    held = _metadata(directory)
    faults = [name for name, tensor in tensors.items() if held.get(name) != tensor.shape]
    if faults:
        raise ValueError(f"the checkpoint {directory.name} lacks {faults[:5]}, or has another shape there")
    if group is None:
        _load_alone(tensors, directory)
    else:
        with others_present():
            dcp.load(tensors, checkpoint_id=directory, process_group=group.checkpoints)
    return int(tensors[UPDATES])


def read(directory: Path, kind: str) -> Iterator[tuple[str, HostArray]]:
    """Yields the whole arrays of a checkpoint in parts, one by one: its `kind` WEIGHTS, or OPTIMIZER's state."""
    for name, shape in _metadata(directory).items():
        if name.startswith(kind):
            dtype = torch.int64 if name == UPDATES else torch.float32
            tensors = {name: torch.empty(shape, dtype=dtype)}
            _load_alone(tensors, directory)
            yield name.removeprefix(kind), host_from_tensor(tensors[name])


def _metadata(directory: Path) -> dict[str, torch.Size]:
    found = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def _load_alone(tensors: dict[str, Tensor], directory: Path) -> None:
    with warnings.catch_warnings():  # that it takes this to be meant
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, checkpoint_id=directory, no_dist=True)
