"""The command among processes that torchrun started: who speaks, what the launcher is told, going on after restarts."""

import json

import pytest

from llamita.cli import together
from llamita.cli.main import main


@pytest.fixture
def second_of_two(monkeypatch, tmp_path):
    known = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(together.ERROR_FILE, str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def test_the_second_process_is_silent_but_for_its_errors(second_of_two, capsys):
    assert main(["info", "tiny"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["train", "--preset", "tiny", "--output", "nowhere"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error (process 2 of 2): --data is missing")
    content = json.loads(second_of_two.read_text())["message"]
    assert content["message"].startswith("--data is missing")
    assert content["extraInfo"]["timestamp"].isdigit()


def test_one_process_has_no_number_and_no_launcher(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(together.ERROR_FILE, str(tmp_path / "error.json"))
    assert main(["train", "--preset", "tiny", "--output", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: --data is missing")
    assert not (tmp_path / "error.json").exists()


def test_a_command_that_may_be_started_again_goes_on_with_its_run(tmp_path, monkeypatch):
    command = ["--data", "data", "--output", str(tmp_path)]
    assert together.restartable(command) == command  # no restarts
    monkeypatch.setenv(together.RESTARTS, "3")
    assert together.restartable(command) == command  # no run yet
    (tmp_path / "run.json").write_text("{}")
    assert together.restartable(command) == [*command, "--resume"]
    assert together.restartable([*command, "--resume"]) == [*command, "--resume"]
    assert together.restartable(["--data", "data"]) == ["--data", "data"]
