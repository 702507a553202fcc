"""AdamW and Muon over parameters that are sharded between two processes: the updates of one process, and its state."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llamita.backend.adamw import AdamWSettings
from llamita.backend.muon import MuonSettings
from llamita.backend.torch.model.fused import FusedParameter
from llamita.backend.torch.train import muon
from llamita.backend.torch.train.optimizer import make_optimizer
from tests.backend.frameworks import host
from tests.backend.optimizers import rates
from tests.backend.steps import largest_difference, same
from tests.together import run_together

LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    f"{LAYER}.self_attn.q_proj.weight": (8, 8),
    f"{LAYER}.self_attn.k_proj.weight": (5, 8),  # one process has a row more than the other
    f"{LAYER}.self_attn.o_proj.weight": (8, 8),
    f"{LAYER}.mlp.gate_proj.weight": (12, 8),
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
    f"{LAYER}.input_layernorm.weight": (8,),
    "model.norm.weight": (1,),  # the other process has none of it
}
MESHES = {
    "one axis": ((2,), lambda name, shape: [Shard(1 if "o_proj" in name else 0)]),
    "replicated": ((2,), lambda name, shape: [Replicate()]),
    "two axes": ((1, 2), lambda name, shape: [Shard(0), Shard(1) if "down" in name else Replicate()]),
}
STEPS = 4


def values(seed):
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def fused(name, tensor):
    return FusedParameter(name, torch.nn.Parameter(tensor), (name,), (len(tensor),), len(SHAPES[name]) == 2)


def copies(optimizer):
    return {name: array.to_numpy().copy() for name, array in optimizer.state().items()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(parameters, with_muon, distribute, first=1, state=None):
    """The values and the state after some steps, begun where a state was left."""
    optimizer = make_optimizer(parameters, AdamWSettings(), MuonSettings() if with_muon else None, "fp32")
    if state is not None:
        optimizer.load_state(state)
    for t in range(first, STEPS + 1):
        for item, gradient in zip(parameters, values(100 + t).values(), strict=True):
            item.parameter.grad = distribute(item.name, torch.from_numpy(gradient))
        optimizer.step(rates(t), 0.5)
        if t == first:
            # Copies: a state lies in the optimiser's own memory.
            early = {item.name: whole(item.parameter.detach()).clone() for item in parameters}, host(copies(optimizer))
    return {item.name: whole(item.parameter.detach()) for item in parameters}, optimizer.state(), early


def counted(counts):
    """`muon.orthogonalized`, which leaves in `counts` how many matrices this process had at each call."""
    compute = muon.orthogonalized

    def orthogonalized(matrices, *options):
        counts.append(len(matrices))
        return compute(matrices, *options)

    return orthogonalized


def compare():
    """In each of two processes: every mesh beside the plain parameters, and gone on from the state of one step."""
    counts = []
    muon.orthogonalized = counted(counts)  # this process ends with the test
    dist.init_process_group("gloo")
    for label, (shape, placements) in MESHES.items():
        mesh = init_device_mesh("cpu", shape)

        def distribute(name, tensor, mesh=mesh, placements=placements):
            return distribute_tensor(tensor.clone(), mesh, placements(name, tensor.shape))

        for with_muon in (False, True):
            start = {name: torch.from_numpy(array) for name, array in values(0).items()}
            plain = [fused(name, tensor.clone()) for name, tensor in start.items()]
            expected, state, _ = train(plain, with_muon, lambda name, tensor: tensor)
            sharded = [fused(name, distribute(name, tensor)) for name, tensor in start.items()]
            counts.clear()
            found, found_state, (early, early_state) = train(sharded, with_muon, distribute)
            both = [None, None]
            dist.all_gather_object(both, list(counts))
            if with_muon:  # five matrices, each once an update; two of one shape are shared out where cut alike
                assert sum(map(sum, both)) == STEPS * 5
                assert sum(both[1]) == (0 if label == "one axis" else STEPS)
            assert all(isinstance(item.parameter, DTensor) for item in sharded)
            for name, tensor in expected.items():
                assert (found[name] - tensor).abs().max() < 1e-6, (label, with_muon, name)
                assert not torch.equal(tensor, start[name])
            assert largest_difference(found_state, state) < 1e-6, (label, with_muon)
            again = [fused(name, distribute(name, tensor)) for name, tensor in early.items()]
            resumed, resumed_state, _ = train(again, with_muon, distribute, 2, early_state)
            assert all(torch.equal(resumed[name], found[name]) for name in found), (label, with_muon)
            assert same(resumed_state, found_state), (label, with_muon)


@pytest.mark.medium
def test_two_processes_make_the_updates_of_one():
    run_together(2, compare)
