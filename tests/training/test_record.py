"""What run.json says of the sessions that made a run: code, environment, command, how each ended."""

import os
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import llamita
from llamita.training import record, run_directory
from llamita.training.run_directory import open_run, read_manifest
from tests.training.helpers import Silence, config, make_step, train


def sessions(run):
    return read_manifest(run)["sessions"]


def test_a_finished_run_says_with_what_it_was_made(tmp_path):
    before = time.time()
    train(config(tmp_path / "run", steps=4), floor=0.5, best_measure=None)
    manifest = read_manifest(tmp_path / "run")
    [session] = manifest["sessions"]
    assert session["state"] == "finished"
    assert (session["first_step"], session["last_step"]) == (0, 4)
    assert before - 1 < session["started"] <= session["ended"] < time.time() + 1
    assert session["command"] == record.command_line(sys.argv)
    assert session["process"] == os.getpid()
    assert session["code"]["llamita"] == llamita.__version__
    versions = session["environment"]["versions"]
    assert (versions["torch"], versions["numpy"]) == (torch.__version__, np.__version__)
    assert versions["python"] == platform.python_version()
    assert session["environment"]["cores"] == os.cpu_count()
    assert session["environment"]["processor"]
    assert manifest["floor"] == 0.5
    assert manifest["conditions"]["threads"] == torch.get_num_threads()


def test_every_session_has_an_entry_and_an_end(tmp_path):
    class Interrupting(Silence):
        def update(self, line):
            if line["step"] == 7:
                os.kill(os.getpid(), signal.SIGINT)

    settings, again = config(tmp_path / "run"), config(tmp_path / "run", resume=True)
    train(settings, display=Interrupting())
    step = make_step(again)
    step.model.model.norm.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(ValueError, match="gradient norm is nan"):
        train(again, step=step)
    broken = make_step(again)
    broken.evaluate = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(again, step=broken)
    train(again)
    first, second, third, last = sessions(tmp_path / "run")
    assert (first["state"], first["first_step"], first["last_step"]) == ("interrupted", 0, 7)
    assert (second["state"], second["first_step"]) == ("failed", 7)
    assert second["reason"].startswith("step 8: the gradient norm is nan")
    assert (third["state"], third["reason"]) == ("failed", "ZeroDivisionError: division by zero")
    assert (last["state"], last["last_step"]) == ("finished", 30)
    assert all(entry["started"] <= entry["ended"] for entry in (first, second, third, last))


def test_a_killed_run_says_running_and_its_lock_says_otherwise(tmp_path):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with open_run(tmp_path / "run", {}, {}, resume=False):
            os.write(write_end, b"x")
            signal.pause()
    os.read(read_end, 1)
    assert run_directory.is_running(tmp_path / "run")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not run_directory.is_running(tmp_path / "run")
    assert sessions(tmp_path / "run")[-1]["state"] == "running"
    assert not run_directory.is_running(tmp_path / "no-run")


def git(directory, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_named_only_where_the_package_is_a_part_of_it(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    assert record.code_version(package) == {"llamita": llamita.__version__}  # installed into somebody's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    found = record.code_version(package)
    assert (found["commit"], found["changed"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "notes.txt").write_text("beside the package")
    assert not record.code_version(package)["changed"]
    (package / "more.py").write_text("")
    assert record.code_version(package)["changed"]
    assert record.code_version(tmp_path / "nowhere") == {"llamita": llamita.__version__}


def test_commands_and_processors_are_read(tmp_path):
    assert record.command_line(["/usr/bin/llamita", "train", "--output", "my run"]) == "llamita train --output 'my run'"
    module = str(record.PACKAGE / "cli/main.py")
    assert record.command_line([module, "train"]) == "python -m llamita.cli.main train"
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Fast 9000 @ 2: 3\n")
    assert record.processor_name(file) == "Fast 9000 @ 2: 3"
    assert record.processor_name(tmp_path / "none")
