"""The programs of forked.py: what a call is given and gives back is what it would be without them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")

REPORT = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), sorted(os.environ.items()), sys.stdin.read(), __name__, sys.path]))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return inherited | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.fixture(scope="module")
def programs(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with forked.programs(tmp_path_factory.mktemp("forked"), environment) as directory:
        yield directory


def test_a_call_is_given_and_gives_back_what_a_new_process_does(
    programs: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    def ask(program: str | Path) -> tuple[str, str, int]:
        arguments = [str(program), "-c", REPORT, "two words", ""]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, input="é\n", capture_output=True, text=True)
        return done.stdout, done.stderr, done.returncode

    assert ask(programs / "python") == ask(sys.executable)
    assert ask(programs / "python")[1:] == ("to stderr\n", 7)


def test_nothing_is_left_of_one_call_in_another_and_the_imports_are_done(
    programs: Path, environment: dict[str, str]
) -> None:
    code = "import sys, os; print('torch' in sys.modules, hasattr(sys, 'mark'), os.environ.get('MARK'), os.getpid())\n"
    change = "sys.mark = 1; os.environ['MARK'] = '1'; sys.modules['torch'] = None"
    lines = [
        subprocess.check_output([programs / "python", "-c", code + change], env=environment, text=True).split()
        for _ in range(2)
    ]
    assert [line[:3] for line in lines] == [["True", "False", "None"]] * 2
    assert lines[0][3] != lines[1][3]


def test_another_environment_runs_the_real_program(programs: Path, environment: dict[str, str]) -> None:
    code = "import os, sys; print(os.environ['COLUMNS'], 'torch' in sys.modules)"
    found = subprocess.check_output([programs / "python", "-c", code], env=environment | {"COLUMNS": "70"}, text=True)
    assert found == "70 False\n"


@pytest.mark.parametrize("arguments", [["--version"], ["info", "tiny"], ["info", "tine"], ["infos"], ["info", "--no"]])
def test_the_command_line_says_the_same(programs: Path, environment: dict[str, str], arguments: list[str]) -> None:
    real = Path(sys.executable).with_name("llamita")
    ours, theirs = (
        subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
        for program in (programs / "llamita", real)
    )
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, theirs.returncode)
    assert ours.stdout + ours.stderr


@pytest.mark.parametrize("arguments", [["-m", "llamita", "info", "tiny"], ["-P", "-u", "-m", "llamita", "infos"]])
def test_a_module_is_run_as_python_runs_it(
    programs: Path, environment: dict[str, str], arguments: list[str], tmp_path: Path
) -> None:
    ours, theirs = (
        subprocess.run([program, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True)
        for program in (programs / "python", sys.executable)
    )
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, theirs.returncode)
    assert ours.stdout + ours.stderr


def test_the_python_that_a_call_starts_is_forked_too(programs: Path, environment: dict[str, str]) -> None:
    asked = "import sys; print('torch' in sys.modules)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {asked!r}], check=True)"
    assert subprocess.check_output([programs / "python", "-c", code], env=environment, text=True) == "True\n"


def test_the_programs_of_a_pipe_run_together(programs: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """The first waits for a word that the second writes when it has read what the first says."""
    first = "import os, time; print('said', flush=True)\nwhile not os.path.exists('heard'): time.sleep(0.01)"
    second = "import pathlib; print(input(), 'and heard'); pathlib.Path('heard').touch()"
    shell = environment | {"PATH": f"{programs}{os.pathsep}{environment['PATH']}"}
    line = f'python -c "{first}" | python -c "{second}"; echo "${{PIPESTATUS[@]}}"'
    done = subprocess.check_output(["bash", "-c", line], env=shell, cwd=tmp_path, text=True, timeout=60)
    assert done == "said and heard\n0 0\n"


def test_a_process_that_a_signal_ends_has_its_status(programs: Path, environment: dict[str, str]) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    done = subprocess.run(["bash", "-c", f"{programs}/python -c '{code}'"], env=environment)
    assert done.returncode == 137


def test_a_call_without_a_program_is_a_process_that_can_be_asked_signalled_and_read(
    programs: Path, environment: dict[str, str]
) -> None:
    code = "import os, sys, time\nprint(os.getpid(), flush=True)\nprint('to stderr', file=sys.stderr)\n"
    call = forked.Call(programs, environment, "python", ["-c", f"{code}sys.exit(7)"])
    assert call.communicate(60) == (f"{call.pid}\nto stderr\n", None)
    assert call.poll() == call.returncode == 7
    call.send_signal(9)  # it has ended: nobody is killed

    call = forked.Call(programs, environment, "python", ["-c", f"{code}time.sleep(600)"])
    assert call.poll() is None
    call.send_signal(9)
    assert call.poll(60) == -9
    with pytest.raises(ProcessLookupError):
        os.kill(call.pid, 0)

    call = forked.Call(programs, environment, "python", ["-c", "import time; time.sleep(600)"])
    with pytest.raises(TimeoutError, match=r"has not ended after 0\.1 seconds"):
        call.communicate(0.1)
    assert call.poll(60) == -9
