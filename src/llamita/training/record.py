"""Under which circumstances a run was made: code, environment, command, when it began and how it ended.

A run is made in one session or in several, for it may be interrupted and resumed; run.json has an entry for each under
`sessions`. None of this decides the result, so nothing here is compared when a run is resumed. Packages are looked up
without being imported; what is trained is not known here.
"""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

import llamita

PACKAGE = Path(llamita.__file__).parent
PACKAGES = ("torch", "mlx", "numpy", "tokenizers", "sentencepiece")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
GIT_SECONDS = 5.0  # a repository on a slow disk is no reason to wait before a run

RUNNING, FINISHED, INTERRUPTED, FAILED, KILLED = "running", "finished", "interrupted", "failed", "killed"
"""The states of a session. `killed` is never written: it is a session that says `running` and is not."""


def session() -> dict[str, Any]:
    """The entry of a session that begins now; times are seconds since 1970."""
    return {
        "state": RUNNING,
        "started": round(time.time(), 3),
        "process": os.getpid(),
        "command": command_line(sys.argv),
        "directory": str(Path.cwd()),
        "code": code_version(PACKAGE),
        "environment": environment(),
    }


def ended(state: str, error: BaseException | None = None) -> dict[str, Any]:
    """Returns what a session's entry gets at its end: the time, the state, what failed in one line."""
    content: dict[str, Any] = {"state": state, "ended": round(time.time(), 3)}
    if state == FAILED and error is not None:
        known = isinstance(error, ValueError | OSError)  # the message alone says what to do
        content["reason"] = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
    return content


def command_line(arguments: Sequence[str]) -> str:
    """The command as a shell takes it; the program by its name alone, as it is found in an environment."""
    first = Path(arguments[0] if arguments else "")
    program = [first.name or "python"]
    if first.is_relative_to(PACKAGE):  # run as a module
        program = ["python", "-m", ".".join(first.relative_to(PACKAGE.parent).with_suffix("").parts)]
    return shlex.join([*program, *arguments[1:]])


def code_version(package: Path) -> dict[str, Any]:
    """The version of this library and, where it is run from a git checkout, the commit and whether that was changed."""
    found: dict[str, Any] = {"llamita": llamita.__version__}
    # A package installed into an environment inside somebody's repository is no part of that repository.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return found
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    if commit:
        found |= {"commit": commit, "changed": bool(changes)}
    return found


def environment() -> dict[str, Any]:
    """Names and versions of all that may make a result differ elsewhere; the device is among the run's conditions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def processor_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as its maker calls it; Linux and macOS have that in places of their own."""
    if file.is_file():
        for line in file.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    if sys.platform == "darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    return platform.processor() or platform.machine()


def latest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The newest session of a run; empty for one that an older version of this library made."""
    sessions = manifest.get("sessions") or [{}]
    return dict(sessions[-1])


def _git(directory: Path, *arguments: str) -> str | None:
    return _output(["git", "-C", str(directory), *arguments])


def _output(command: Sequence[str]) -> str | None:
    """Returns what a command prints; None where there is no such command, or it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
