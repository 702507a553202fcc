"""`llamita train` as a process: exit statuses, Ctrl-C and other signals, a second run, kills at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from llamita.cli.main import main
from llamita.training.run_directory import RunDirectory
from llamita.workflows import runs
from tests.training.helpers import prepare_stories, timeless, weights_of

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = [f"{name}={value}" for name, value in SHAPE.items()] + ["num_key_value_heads=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_stories(tmp_path_factory.mktemp("stories"))


def flags(data, output, steps=120, **changes):
    """A model of a few thousand parameters that writes a checkpoint every third update."""
    values = {
        "data": data,
        "output": output,
        "steps": steps,
        "batch-size": 4,
        "micro-batch-size": 3,
        "sequence-length": 24,
        "evaluate-every": 20,
        "evaluation-rows": 4,
        "checkpoint-every": 3,
        "sample-tokens": 4,
        "dropout": 0.1,
        "threads": 1,
        "precision": "fp32",
    } | changes
    named = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return ["--set", *SMALL, *named]


def start(arguments):
    command = [sys.executable, "-m", "llamita.cli.main", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture
def fork(call):
    """What `start` does, without the seconds for imports."""
    return lambda arguments: call("llamita", ["train", *map(str, arguments)])


def wait_for_lines(process, run, count, limit=120.0):
    """Return when metrics.jsonl has `count` lines, or the process has ended."""
    end = time.monotonic() + limit
    file = run / "metrics.jsonl"
    while process.poll() is None:
        assert time.monotonic() < end, "the run does not get on"
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.001)


def finish(process, limit=240.0):
    output, _ = process.communicate(timeout=limit)
    return process.returncode, output


def kill_and_resume(data, tmp_path, fork, kills, seed, steps=120, **options):
    """Run once undisturbed, once killed `kills` times at random moments; the two must be the same."""
    moments = random.Random(seed)
    code, output = finish(start(flags(data, tmp_path / "whole", steps, **options)))
    assert code == 0, output
    run = tmp_path / "killed"
    arguments = flags(data, run, steps, **options)
    for kill in range(kills):
        process = fork(arguments)
        wait_for_lines(process, run, int(steps * (kill + moments.random()) / (kills + 0.5)))
        time.sleep(moments.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (run / "run.json").exists():
            arguments = ["--output", run, "--resume"]
    code, output = finish(fork(arguments))
    assert code == 0, output
    assert weights_of(tmp_path / "whole/last") == weights_of(run / "last")
    assert timeless(tmp_path / "whole") == timeless(run)
    assert (tmp_path / "whole/samples.txt").read_text() == (run / "samples.txt").read_text()
    assert os.readlink(tmp_path / "whole/best") == os.readlink(run / "best")
    assert sorted(os.listdir(tmp_path / "whole/checkpoints")) == sorted(os.listdir(run / "checkpoints"))
    assert sorted(os.listdir(tmp_path / "whole")) == sorted(os.listdir(run))


@pytest.mark.medium
def test_three_kills_leave_no_trace(data, tmp_path, fork):
    kill_and_resume(data, tmp_path, fork, kills=3, seed=int(os.environ.get("LLAMITA_TEST_SEED", "1")))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_kills_leave_no_trace(data, tmp_path, fork, precision):
    kill_and_resume(data, tmp_path, fork, kills=20, seed=2, steps=400, precision=precision)


@pytest.mark.slow
def test_kills_of_a_compiled_run_leave_no_trace(data, tmp_path):
    options = {"precision": "bf16", "micro-batch-size": 4}
    moments = random.Random(3)
    code, output = finish(start([*flags(data, tmp_path / "whole", 100, **options), "--compile"]), 600)
    assert code == 0, output
    arguments = [*flags(data, tmp_path / "killed", 100, **options), "--compile"]
    for at in (20, 50, 80):
        process = start(arguments)
        wait_for_lines(process, tmp_path / "killed", at, 400)
        time.sleep(moments.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        arguments = ["--output", tmp_path / "killed", "--resume"]
    code, output = finish(start(arguments), 600)
    assert code == 0, output
    assert weights_of(tmp_path / "whole/last") == weights_of(tmp_path / "killed/last")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "killed")


@pytest.mark.medium
def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path, fork):
    run = tmp_path / "run"
    process = start(flags(data, run, steps=100_000, **{"checkpoint-every": 0, "evaluate-every": 0}))
    wait_for_lines(process, run, 20)
    second = fork(["--output", run, "--resume"])
    code, output = finish(second)
    assert code == 2
    assert output.startswith("error: ")
    assert f"in use by another training run (process {process.pid})" in output
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130
    assert "Traceback" not in output
    assert f"llamita train --output {run} --resume" in output
    (step,) = RunDirectory(run, {}).steps()
    assert step >= 20
    assert timeless(run)[-1]["step"] == step


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_s_signal_saves_and_ends_with_its_status(data, tmp_path, fork, number):
    """What is saved is the uninterrupted run's, to be gone on with."""
    options = {"checkpoint-every": 0, "evaluate-every": 0, "schedule": "constant", "warmup-steps": 5}
    process = fork(flags(data, tmp_path / "run", steps=100_000, **options))
    wait_for_lines(process, tmp_path / "run", 20)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 143, output
    assert "Traceback" not in output
    assert f"llamita train --output {tmp_path / 'run'} --resume" in output
    session = json.loads((tmp_path / "run/run.json").read_text())["sessions"][-1]
    (step,) = RunDirectory(tmp_path / "run", {}).steps()
    assert (session["state"], session["signal"], session["last_step"]) == ("interrupted", number.name, step)
    assert main(["runs", "show", str(tmp_path / "run")]) == 0
    code, output = finish(fork(flags(data, tmp_path / "whole", steps=step, **options)))
    assert code == 0, output
    assert weights_of(tmp_path / "run/last") == weights_of(tmp_path / "whole/last")


IMPATIENT = """
import os, signal, sys
from tests.training.helpers import Silence, config, train

class Impatient(Silence):
    def update(self, record):
        if record["step"] == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)

train(config(sys.argv[1]), display=Impatient())
"""


@pytest.mark.medium
def test_a_second_signal_ends_at_once(tmp_path, call):
    code, output = finish(call("python", ["-c", IMPATIENT, str(tmp_path / "run")]))
    assert code == -signal.SIGTERM, output  # by the signal itself: 143 for a shell
    assert runs.open_run(tmp_path / "run").state == "killed"
    assert RunDirectory(tmp_path / "run", {}).newest(pytest.fail).step == 4


def test_mistakes_end_in_one_line(data, tmp_path, capsys):
    for arguments, message in [
        (["--preset", "huge", "--data", data, "--output", tmp_path / "run"], "no preset named 'huge'"),
        (["--data", tmp_path / "none", "--output", tmp_path / "run"], "none"),
        (["--output", tmp_path / "run"], "--data is missing"),
        (["--output", tmp_path / "run", "--resume"], "no training run"),
        ([*flags(data, tmp_path / "run"), "--warmup-steps", "1000"], "warmup_steps=1000"),
    ]:
        assert main(["train", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        error = captured.err
        assert message in " ".join(error.split())
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
