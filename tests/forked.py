"""`llamita`, `python` and `torchrun` as programs that need not import: each call is a process, without the seconds for
imports.

A server imports what the verbs need, and so the framework, once; for each call it forks. The new process has the
arguments, the working directory and the very stdin, stdout and stderr of its caller, and nothing of another call.
A run of training takes the shortcuts of shortcuts.py; the picture of its losses is one that the server drew.
It ends as Python ends, save that its objects are left to the system: taking them apart one by one would write to, and
so copy, every page of memory that the process shares with the server.
`programs` writes the programs, which ask the server; put in front of the PATH, a shell finds them. They run the real
ones where a call's environment is another than the server's, which imports have read. A Python that a call starts as
`sys.executable` is such a program too.
"""

import ast
import atexit
import contextlib
import gc
import importlib
import itertools
import json
import os
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = ("lm_eval_adapter", "peers")
"""Modules that import another package with threads of its own; few calls need them."""
VARYING = re.compile(
    "PWD|OLDPWD|SHLVL|_|PATH|PYTHONDONTWRITEBYTECODE|PYTEST_CURRENT_TEST"
    "|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|TORCH_NCCL_.*"
)
"""Variables of a shell, of torchrun and of pytest, which no import reads; they may differ from the server's."""
CHOSEN_LATER = (
    *("llamita.backend.torch.backend", "torch.fx.experimental.symbolic_shapes", "torch.utils._device"),
    *("tyro", "typeguard", "rich.table", "matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.Image"),
    *("numba.typed", "scipy.linalg", "torch.distributed.run"),
    *(f"llamita.backend.torch.infer.kernels.{name}" for name in ("products", "head", "decode")),
)
"""What verbs import beside what their own files name, where it is installed."""

PROGRAM = """#!{python} -IS
import array, json, os, socket, struct, sys
real = {real!r}
call = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    files = array.array("i", [0, 1, 2])
    server.sendmsg([struct.pack("!I", len(call))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    server.sendall(call)
    if not server.recv(4):
        os.execv(real, [real, *sys.argv[1:]])
    status, = struct.unpack("!i", server.recv(4))
os._exit(status if status >= 0 else 128 - status)  # as a shell tells it
"""


@contextlib.contextmanager
def programs(directory: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """Yields a new directory of programs to put in front of the PATH, which work until the `with` ends; on Linux alone,
    elsewhere it is empty.

    `environment` is that of the calls. A call that is killed leaves what it runs to the end of the `with`.
    """
    made, address = directory / "programs", str(directory / "socket")
    made.mkdir()
    if sys.platform != "linux":  # elsewhere frameworks do not outlive a fork
        yield made
        return
    for name in ("llamita", "torchrun", "python"):
        real = sys.executable if name == "python" else str(Path(sys.executable).with_name(name))
        (made / name).write_text(PROGRAM.format(python=sys.executable, real=real, address=address))
        (made / name).chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, address, str(made / "python")],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n", server.communicate()[1]
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.communicate()


@dataclass(frozen=True)
class Programs:
    """The directory of such programs, and the environment that they are for."""

    directory: Path
    environment: dict[str, str]

    def find(self, name: str) -> str:
        """Returns the path of a program; that of the real one where none is forked."""
        path = os.pathsep.join(map(str, (self.directory, Path(sys.executable).parent)))
        return shutil.which(name, path=path) or name


class Call:
    """A call without a program that asks for it, as `subprocess.Popen` gives it: `pid` is that of the process itself.

    What it writes to stdout and stderr comes together, in `communicate`; to stdin it has nothing.
    """

    def __init__(self, programs: Path, environment: Mapping[str, str], program: str, arguments: list[str]) -> None:
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(str(programs.with_name("socket")))
        call = json.dumps([program, arguments, os.getcwd(), dict(environment)]).encode()
        output, written = os.pipe()
        with open(os.devnull) as nothing, open(written, "wb") as file:
            files = [nothing.fileno(), file.fileno(), file.fileno()]
            socket.send_fds(self._server, [struct.pack("!I", len(call))], files)
            self._server.sendall(call)
            (self.pid,) = struct.unpack("!i", self._server.recv(4))
        self._output = open(output, encoding="utf-8")  # noqa: SIM115 (it is read to its end later)

    def poll(self, timeout: float | None = 0.0) -> int | None:
        """Returns its exit status, minus the number of a signal that ended it, or None where it runs on."""
        if self.returncode is None and select.select([self._server], [], [], timeout)[0]:
            with self._server:
                (self.returncode,) = struct.unpack("!i", self._server.recv(4))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Returns what it wrote, once it has ended. TimeoutError where it has not after so many seconds."""
        text: list[str] = []
        reader = threading.Thread(target=lambda: text.append(self._output.read()), daemon=True)
        reader.start()
        if self.poll(timeout) is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(f"process {self.pid} has not ended after {timeout} seconds")
        reader.join()
        self._output.close()
        return text[0], None


def main(address: str, python: str) -> int:
    """Serves calls, and never returns in the server; in the process of a call, returns its exit status."""
    import_what_verbs_import()
    for name in CHOSEN_LATER:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    runpy.run_path(str(Path(__file__).with_name("shortcuts.py")))["take"](drawn=True)
    gc.freeze()  # pages that no collection writes to stay shared
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        tasks = Path("/proc/self/task")
        assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a process with threads is not safe to fork"
        print("ready", flush=True)
        callers: dict[int, socket.socket] = {}
        while True:
            if select.select([listener], [], [], 0.005 if callers else None)[0]:
                caller, _ = listener.accept()
                program, arguments, directory, environment, files = received(caller)
                if not same(environment, os.environ):
                    caller.close()
                elif child := os.fork():
                    callers[child] = caller
                    with contextlib.suppress(BrokenPipeError):
                        caller.sendall(struct.pack("!i", child))
                else:
                    break
                for file in files:
                    os.close(file)
            for child in list(callers):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    with callers.pop(child) as caller, contextlib.suppress(BrokenPipeError):
                        caller.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
    for other in (caller, *callers.values()):
        other.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    os.chdir(directory)
    os.environ.update({name: value for name, value in environment.items() if VARYING.fullmatch(name)})
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    sys.executable = python
    return call(program, arguments)


def call(program: str, arguments: list[str]) -> int:
    """Does what a program does in a process of its own; returns its exit status, or raises SystemExit with it."""
    sys.argv = [program, *arguments]
    if program == "llamita":
        from llamita.cli.main import main as llamita

        return llamita()
    if program == "torchrun":
        from torch.distributed.run import main as torchrun

        torchrun()
        return 0
    options = list(itertools.takewhile(("-P", "-u").__contains__, arguments))
    kind, what, *rest = arguments[len(options) :]
    assert kind in ("-c", "-m"), f"expected python -c or -m, got: python {shlex.join(arguments)}"
    if "-P" not in options:
        sys.path.insert(0, "" if kind == "-c" else os.getcwd())
    if "-u" in options:
        sys.stdout.reconfigure(write_through=True)
    sys.argv = [kind, *rest]
    if kind == "-m":
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(module))
    return 0


def end(status: int) -> None:
    """Ends a process as Python does, but for taking its objects apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def received(caller: socket.socket) -> tuple[str, list[str], str, dict[str, str], list[int]]:
    """Returns a call: program, arguments, working directory, environment, and stdin, stdout and stderr."""
    head, files, _, _ = socket.recv_fds(caller, 4, 3)
    (length,) = struct.unpack("!I", head)
    text = b""
    while len(text) < length:
        text += caller.recv(length - len(text))
    return *json.loads(text), files


def same(environment: Mapping[str, str], own: Mapping[str, str]) -> bool:
    first, second = ({k: v for k, v in given.items() if not VARYING.fullmatch(k)} for given in (environment, own))
    return first == second


def import_what_verbs_import() -> None:
    """Imports the files of the command line and what of ours is imported in their functions."""
    import llamita.cli

    for file in sorted(Path(next(iter(llamita.cli.__path__))).glob("*.py")):
        importlib.import_module(f"llamita.cli.{file.stem}")
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llamita"):
                names = [name.name for name in node.names if name.name not in LEFT_OUT]
                if node.module.split(".")[-1] not in LEFT_OUT:
                    _import(node.module, names)


def _import(module: str, names: list[str]) -> None:
    """Imports a module of ours, but not one over a package that is not installed: few verbs need it."""
    try:
        importlib.__import__(module, fromlist=names)
    except ModuleNotFoundError as error:
        if (error.name or "llamita").split(".")[0] == "llamita":
            raise


if __name__ == "__main__":
    try:
        status = main(*sys.argv[1:])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise
        status = stop.code or 0
    end(status)
