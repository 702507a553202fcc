"""A run by several processes against one by one: its record, its checkpoints, kills, errors that all are told."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from llamita.backend.torch.backend import BACKEND
from llamita.storage.safetensors import read_safetensors
from llamita.training.config import with_options
from llamita.training.run_directory import RunDirectory
from llamita.workflows.pretrain import pretrain
from tests.together import run_together
from tests.training.helpers import Silence, prepare_stories
from tests.workflows.test_pretrain import settings

FSDP, TEAM = {"parallel": "fsdp"}, {"parallel": "fsdp", "tensor_parallel": 2}
STEPS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_stories(tmp_path_factory.mktemp("stories"))


def options(output, data, optimizer="adamw", **changes):
    """Without dropout, whose numbers depend on the number of processes."""
    heads = ("num_attention_heads=2", "num_key_value_heads=2")
    config = settings(output, data, dropout=0.0, steps=STEPS, checkpoint_every=4, optimizer=optimizer, **changes)
    return with_options(config, set=(*config.set, *heads))


def train(config):
    result = pretrain(config, BACKEND, display=Silence())
    return result.step, result.interrupted


def go_on(config, **changes):
    return with_options(config, resume=True, **changes)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


def arrays(run, name="model"):
    found = read_safetensors(run / "last" / f"{name}.safetensors")
    return {key: array.to_numpy().copy() for key, array in found.items()}


def assert_same_run(found, expected):
    ours, theirs = losses(found), losses(expected)
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    np.testing.assert_allclose([line[2] for line in ours], [line[2] for line in theirs], rtol=1e-5)
    for name in ("model", "optimizer"):
        ours, theirs = arrays(found, name), arrays(expected, name)
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def at_checkpoint(run, step):
    """Says whether a checkpoint of this step or a later one is there."""
    return lambda: any(int(path.name[5:]) >= step for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.medium
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_twice_and_resumed_by_other_numbers_of_processes(tmp_path, data, optimizer):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(options(whole, data, optimizer)) == (STEPS, False)
    config = options(run, data, optimizer)
    run_together(2, train, with_options(config, **FSDP), until=at_checkpoint(run, 8))
    assert (run / "last/shards").is_dir()
    run_together(2, train, go_on(config, **TEAM), until=at_checkpoint(run, 16))
    assert train(go_on(config)) == (STEPS, False)  # alone, from parts
    assert_same_run(run, whole)


@pytest.mark.medium
def test_a_killed_run_of_the_same_form_ends_with_the_same_bits(tmp_path, data):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_together(2, train, options(whole, data, **FSDP)) == (STEPS, False)
    config = options(run, data, **FSDP)
    run_together(2, train, config, until=at_checkpoint(run, 8))
    assert run_together(2, train, go_on(config)) == (STEPS, False)
    for name in ("model", "optimizer"):
        ours, theirs = arrays(run, name), arrays(whole, name)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert not (run / "last/shards").exists()  # put together at the end
    assert not list((run / "checkpoints").glob(".*"))
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert [session["state"] for session in sessions] == ["running", "finished"]


def full_disk(self, step, *given, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


def train_on_a_full_disk(config):
    """What each process is told when the first one cannot write."""
    import torch.distributed as dist

    RunDirectory.save = RunDirectory.finish_shards = full_disk
    try:
        train(config)
    except OSError as error:
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, str(error))
        return told


@pytest.mark.medium
@pytest.mark.parametrize("form", [{}, FSDP], ids=["ddp", "fsdp"])
def test_all_are_told_of_an_error_of_the_one_that_writes(tmp_path, data, form):
    told = run_together(2, train_on_a_full_disk, options(tmp_path / "run", data, **form))
    assert told == ["[Errno 28] No space left on device"] * 2
    session = json.loads((tmp_path / "run/run.json").read_text())["sessions"][-1]
    assert (session["state"], "No space" in session["reason"]) == ("failed", True)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, data):
    config = options(Path(tmp_path / "run"), data, batch_size=5)
    with pytest.raises(AssertionError, match=r"batch_size=5 must be a multiple of the 2 parts .* try 4 or 6"):
        run_together(2, train, config)
    with pytest.raises(ValueError, match="tensor_parallel=2 needs several processes"):
        train(options(tmp_path / "team", data, **TEAM))
