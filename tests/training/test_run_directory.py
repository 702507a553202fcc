"""The run directory: who may hold it, what is compared, damaged and half-written checkpoints, a full disk."""

import json
import os
import resource
import signal

import numpy as np
import pytest

from llamita.model.host_array import HostArray
from llamita.training.run_directory import compare, open_run, read_manifest
from tests.training.helpers import MODEL

IDENTITY = {"model": {"hidden_size": 16}, "data": {"train": "abc"}, "training": {"seed": 1, "steps": 5}}


def arrays(value):
    return {"w": HostArray.from_numpy(np.full((64, 64), value, dtype=np.float32))}


def save(run, step, **state):
    run.save(step, MODEL, arrays(step), {"t": HostArray.from_numpy(np.array([step]))}, state)


@pytest.fixture
def run(tmp_path):
    with open_run(tmp_path / "run", IDENTITY, {"seed": 1}, resume=False) as opened:
        yield opened


def test_save_load_and_links(run):
    assert run.newest(pytest.fail) is None
    for step in (5, 10):
        save(run, step, data={"step": step})
    found = run.newest(pytest.fail)
    assert (found.step, found.state["data"]) == (10, {"step": 10})
    assert (found.weights["w"].to_numpy() == 10).all()
    assert os.readlink(run.file("last")) == "checkpoints/step-00000010"
    run.link("best", 5)
    run.prune(1, 5)
    assert run.steps() == [5, 10]
    run.prune(1, None)
    assert run.steps() == [10]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "train_state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_damaged_checkpoint_is_reported_and_passed_over(run, name, damage):
    save(run, 5)
    save(run, 10)
    file = run.checkpoint_path(10) / name
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-7])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    if (name, damage) == ("train_state.json", "flip"):
        file.write_text(file.read_text().replace('"format": 1', '"format": 9'))
    reports = []
    found = run.newest(reports.append)
    assert found.step == 5
    assert len(reports) == 1
    assert "step-00000010 is damaged" in reports[0]
    assert name in reports[0]
    (run.checkpoint_path(5) / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="every checkpoint"):
        run.newest(reports.append)


def test_what_a_killed_process_left_is_removed(tmp_path):
    with open_run(tmp_path / "run", IDENTITY, {}, resume=False) as run:
        save(run, 5)
    half = tmp_path / "run/checkpoints/.step-00000010.x1y2.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run/.run.json.abc.tmp").write_text("{")
    (tmp_path / "run/.last.link").symlink_to("nowhere")
    with open_run(tmp_path / "run", IDENTITY, {}, resume=True) as run:
        assert run.newest(pytest.fail).step == 5
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "checkpoints", "last", "run.json"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    with open_run(tmp_path / "run", IDENTITY, {}, resume=False):
        with pytest.raises(ValueError, match=f"in use by another training run .process {os.getpid()}"):
            open_run(tmp_path / "run", IDENTITY, {}, resume=True).__enter__()
        with pytest.raises(ValueError, match="add --resume"):
            open_run(tmp_path / "run", IDENTITY, {}, resume=False).__enter__()
    with open_run(tmp_path / "run", IDENTITY, {}, resume=True):
        pass


def test_a_killed_process_gives_up_the_directory(tmp_path):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with open_run(tmp_path / "run", IDENTITY, {}, resume=False):
            os.write(write_end, b"x")
            signal.pause()
    os.read(read_end, 1)
    with pytest.raises(ValueError, match=f"process {child}"):
        open_run(tmp_path / "run", IDENTITY, {}, resume=True).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open_run(tmp_path / "run", IDENTITY, {}, resume=True):
        pass


def test_a_run_that_died_before_its_manifest_is_begun_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("123\n")
    (tmp_path / "run/.run.json.abc.tmp").write_text("{")
    with open_run(tmp_path / "run", IDENTITY, {}, resume=False):
        assert read_manifest(tmp_path / "run")["identity"] == IDENTITY


def test_refusals_write_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("x")
    for path, resume, message in [
        ("file", False, "is a file"),
        ("other", False, "not empty"),
        ("new", True, "no training run to resume"),
        ("other", True, "no training run to resume"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_run(tmp_path / path, IDENTITY, {}, resume).__enter__()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "notes.txt", "other"]


def test_every_differing_key_is_named():
    changed = {"model": {"hidden_size": 32}, "data": {"train": "xyz"}, "training": {"seed": 1, "steps": 5, "new": 2}}
    with pytest.raises(ValueError, match="cannot be resumed") as error:
        compare(IDENTITY, changed)
    for text in ("model.hidden_size was 16 and is now 32", "data.train was 'abc'", "training.new was None"):
        assert text in str(error.value)
    assert "seed" not in str(error.value)
    compare(IDENTITY, json.loads(json.dumps(IDENTITY)))


def test_a_field_that_an_older_version_lacked_stands_at_its_default():
    compare({"model": {"vocab_size": 8}}, {"model": {"vocab_size": 8, "label_names": (), "quantization": ""}})
    with pytest.raises(ValueError, match=r"model\.quantization was '' and is now 'int8'"):
        compare({"model": {"vocab_size": 8}}, {"model": {"vocab_size": 8, "quantization": "int8"}})


def test_a_run_of_an_older_version_was_made_by_adamw():
    older = {"training": {"steps": 5}}
    compare(older, {"training": {"steps": 5, "optimizer": "adamw", "momentum": 0.95, "nesterov": True}})
    with pytest.raises(ValueError, match=r"so: training\.optimizer was 'adamw' and is now 'muon'; start"):
        compare(older, {"training": {"steps": 5, "optimizer": "muon", "momentum": 0.95, "nesterov": True}})


def test_a_full_disk_leaves_the_earlier_checkpoints(run):
    save(run, 5)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # a write past it fails as on a full disk
    try:
        with pytest.raises(OSError, match=r"step-00000010 could not be written: .*earlier checkpoints are intact"):
            save(run, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000005"]
    assert os.readlink(run.file("last")) == "checkpoints/step-00000005"
    assert run.newest(pytest.fail).step == 5


def test_a_key_that_an_older_version_lacked_counts_where_it_is_on():
    older = {"data": {"kept": 3}}
    compare(older, {"data": {"kept": 3, "bad": 0, "strict": False}})
    with pytest.raises(ValueError, match=r"data\.bad was None and is now 2"):
        compare(older, {"data": {"kept": 3, "bad": 2}})
    with pytest.raises(ValueError, match=r"data\.kept was 3 and is now None"):
        compare(older, {"data": {}})
