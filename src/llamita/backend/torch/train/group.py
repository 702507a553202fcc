"""The processes of a run over `torch.distributed`: how one joins, and how they agree.

What must be agreed on goes over gloo in the host's memory, also where gradients go over NCCL.
"""

import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llamita.backend.group import ParallelSettings

Result = TypeVar("Result")
DATA, TENSOR = "data", "tensor"
POLL = 0.02  # seconds
LOST = ("gloo", "nccl", "c10d", "processgroup", "connection", "broken pipe", "rendezvous", "tcpstore")
"""Words in the messages of torch.distributed when another process is gone."""


class TorchGroup:
    """A `Group` over the default process group: teams of `tensor_parallel` neighbours, which share rows."""

    def __init__(self, settings: ParallelSettings, device: str) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        team = settings.tensor_parallel
        if self.size % team:
            raise ValueError(f"tensor_parallel={team} must divide the {self.size} processes of the run")
        self.settings = settings
        self.data_size, self.data_rank = self.size // team, self.rank // team
        self.checkpoints = dist.new_group(backend="gloo")  # what writes them works beside the updates
        self.mesh: DeviceMesh = init_device_mesh(device, (self.data_size, team), mesh_dim_names=(DATA, TENSOR))

    def any(self, flag: bool) -> bool:
        found = torch.tensor(int(flag))
        with others_present():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def sums(self, values: Sequence[float]) -> list[float]:
        found = torch.tensor(values, dtype=torch.float64)
        with others_present():
            dist.all_reduce(found)
        return found.tolist()

    def gather(self, value: Any) -> list[Any]:
        found = [None] * self.size
        with others_present():
            dist.all_gather_object(found, value)
        return found

    def first(self, make: Callable[[], Result]) -> Result:
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = make()
            except Exception as error:  # all are told, and all raise it
                told[1] = error
        with others_present():
            dist.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]


def join(settings: ParallelSettings, device: str) -> TorchGroup:
    """Joins the processes that were started together, over NCCL on GPUs and gloo on CPUs; the device is this one's."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # Warnings about the cost of gathering what is cut twice, and of gloo's exchanges, which nothing here can lower.
    for module in ("_redistribute", "_collective_utils"):
        logging.getLogger(f"torch.distributed.tensor.{module}").setLevel(logging.ERROR)
    if not dist.is_initialized():
        with others_present():
            store, rank, size = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(_meeting(store, rank, size), store)
            form = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(form, store=store, rank=rank, world_size=size)
    return TorchGroup(settings, device)


def _meeting(store: dist.Store, rank: int, size: int) -> str:
    """Returns a name that the processes which meet now have in common, and that those before them had not.

    Processes that torchrun starts again find the store of the first ones, and in it addresses where nobody is any more.
    Each leaves a new name of its own; the first process tries the names it finds until all of them answer.
    """
    own = uuid.uuid4().hex
    store.set(f"name of {rank}", own)
    while True:
        if rank == 0:
            names = [store.get(f"name of {other}").decode() for other in range(size)]
            store.set("meeting", ",".join(names))
        names = store.get("meeting").decode().split(",")
        meeting = hashlib.sha256(",".join(names).encode()).hexdigest()[:16]
        if names[rank] == own:
            store.set(f"{meeting}: {rank} is here", "")
            if rank == 0 and store.check([f"{meeting}: {other} is here" for other in range(size)]):
                store.set(f"{meeting} begins", "")
            if store.check([f"{meeting} begins"]):
                return meeting
        time.sleep(POLL)


@contextlib.contextmanager
def others_present() -> Iterator[None]:
    """Turns what torch.distributed raises when another process is gone into a ConnectionError of one line."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, dist.DistError) or any(word in text.lower() for word in LOST):
            raise ConnectionError("another process of this run was lost") from error
        raise
