"""What is delivered: declared dependencies, the Makefile, the scripts, the version, what git would carry."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from llamita import __version__

ROOT = Path(__file__).resolve().parents[1]
COURSES = ROOT / "src" / "llamita" / "learn" / "tracks"  # data: files that a reader works on, and checks of them
PROJECT, TOOL = (tomllib.loads((ROOT / "pyproject.toml").read_text())[table] for table in ("project", "tool"))
# Where a module's name is not in the metadata, or its package need not be installed.
DISTRIBUTIONS = {"mlx": "mlx", "sentencepiece": "sentencepiece", "llama_cpp": "llama-cpp-python"}


def requirement_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def third_party_modules() -> set[str]:
    found = set()
    for path in set((ROOT / "src").rglob("*.py")) - set(COURSES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - {"llamita"}


def test_every_package_that_the_source_imports_is_declared() -> None:
    extras = [requirement for group in PROJECT["optional-dependencies"].values() for requirement in group]
    declared = {requirement_name(requirement) for requirement in PROJECT["dependencies"] + extras}
    providers = metadata.packages_distributions()
    for module in third_party_modules():
        names = {name.lower().replace("_", "-") for name in providers.get(module, [])} | {DISTRIBUTIONS.get(module, "")}
        assert names & declared, f"src imports {module}, which pyproject.toml does not declare"


def test_the_version_is_one() -> None:
    """It stands in the package alone, from which the distribution takes it."""
    assert "version" in PROJECT["dynamic"]
    assert TOOL["setuptools"]["dynamic"]["version"] == {"attr": "llamita.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?", __version__)
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_torch_requirement_bounds_both_ends() -> None:
    assert "torch>=2.10,<2.14" in PROJECT["dependencies"]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, env=environment, text=True, capture_output=True
    )


def test_make_alone_explains_the_targets() -> None:
    shown = make()
    assert shown.returncode == 0
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    for target in phony[1].split():
        assert target == "help" or f"make {target} " in shown.stdout


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("quickstart", ".venv/bin/llamita quickstart"),
        ("test", "-m pytest -n"),
        ("test-slow", '-m pytest -m "slow and not gpu"'),
        ("test-gpu", "-m pytest -m gpu"),
        ("check", "scripts/check"),
        ("site", "-m mkdocs build --strict"),
        ("release", "scripts/release .venv/bin/python"),
    ],
)
def test_a_target_makes_the_environment_and_runs_its_command(target: str, command: str) -> None:
    planned = make("--dry-run", "--always-make", target)
    assert planned.returncode == 0, planned.stderr
    assert "scripts/create_venv.py .venv" in planned.stdout
    assert "pip --disable-pip-version-check install" in planned.stdout
    assert planned.stdout.rstrip().splitlines()[-1].find(command) >= 0


def test_the_environment_is_made_once_and_repaired_when_broken(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "create_venv.py"), str(tmp_path / "venv")]
    broken = tmp_path / "venv" / "bin"
    broken.mkdir(parents=True)
    (broken / "python").write_text("not an interpreter")
    subprocess.run(script, check=True)
    marker = tmp_path / "venv" / "marker"
    marker.touch()
    subprocess.run(script, check=True)
    assert marker.exists()  # it worked, so it was kept


def test_an_old_interpreter_is_refused_in_one_line(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "create_venv.py"
    code = f"import sys, runpy; sys.version_info = (3, 9, 6); sys.argv = ['create_venv.py', {str(tmp_path / 'venv')!r}]"
    code += f"; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Llamita needs Python 3.11 or newer and ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("name", ["scripts/check", "scripts/release", ".ci/run"])
def test_the_scripts_are_runnable_shell(name: str) -> None:
    script = ROOT / name
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_nothing_that_is_carried_names_a_machine() -> None:
    """No absolute path of the machine that the project was built on: it must run anywhere."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    home_like = re.compile(rb"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/")
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path != Path(__file__):
            match = home_like.search(path.read_bytes())
            assert match is None, f"{name} names {match[0].decode()}..."


def test_every_file_that_is_no_module_is_carried_too() -> None:
    package = ROOT / "src" / "llamita"
    patterns = TOOL["setuptools"]["package-data"]["llamita"]
    carried = {path for pattern in patterns for path in package.glob(pattern)}
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    others = {path for path in files if path.suffix != ".py" or COURSES in path.parents}
    assert COURSES / "min_llama" / "torch" / "llama.py" in others
    assert others <= carried


def test_every_folder_of_the_source_is_a_package() -> None:
    """setuptools carries only folders with an `__init__.py`."""
    folders = {path.parent for path in (ROOT / "src" / "llamita").rglob("*.py")}
    folders = {folder for folder in folders if COURSES not in (folder, *folder.parents)}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
