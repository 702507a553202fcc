"""Runs nginx with deploy/nginx.conf as it stands, but for ports, places of files, and the addresses of replicas."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "nginx.conf"
VARIABLE = "LLAMITA_NGINX"
"""The path of nginx where it is not on PATH, for example unpacked from its package."""


@contextlib.contextmanager
def proxying(replicas: Sequence[str], directory: Path) -> Iterator[str]:
    """Yields the URL of an nginx before replicas (host:port each); skips the test where there is no nginx."""
    program = os.environ.get(VARIABLE) or shutil.which("nginx")
    if program is None:
        pytest.skip(f"no nginx on PATH; install it, or name one in {VARIABLE}")
    port = free_port()
    config = directory / "nginx.conf"
    config.write_text(adapted(CONFIG.read_text(), port, replicas, directory))
    main = f"daemon off; pid {directory}/nginx.pid; user {getpass.getuser()};"
    command = [program, "-p", str(directory), "-c", str(config), "-e", str(directory / "error.log"), "-g", main]
    subprocess.run([*command, "-t", "-q"], check=True)
    process = subprocess.Popen(command)
    try:
        begun = time.monotonic()
        while not accepts(port):
            assert process.poll() is None, (directory / "error.log").read_text()
            assert time.monotonic() - begun < 20
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def adapted(text: str, port: int, replicas: Sequence[str], directory: Path) -> str:
    """Returns the configuration with other ports, replicas and places; each of them must be there to be replaced."""
    servers = re.findall(r"^ *server 127.*;\n", text, re.MULTILINE)
    assert len(servers) == 2
    options = servers[0].split(maxsplit=2)[2]
    text = text.replace(servers[1], "")
    text = replaced(text, servers[0], "".join(f"        server {replica} {options}" for replica in replicas))
    text = replaced(text, "listen 8080;", f"listen 127.0.0.1:{port};")
    text = replaced(text, "/var/log/nginx/llamita.log", str(directory / "access.log"))
    text = replaced(text, "worker_processes auto;", "worker_processes 1;")
    places = "".join(
        f"    {kind}_temp_path {directory}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return replaced(text, "http {\n", "http {\n" + places)


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
