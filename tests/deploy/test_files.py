"""The container's and systemd's files: what can be shown of them without a container engine or a running systemd."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest

from llamita.cli.main import parse_and_call
from llamita.cli.serve import ServeConfig
from llamita.server.settings import ServerLimits
from tests.workflows.benchmark import scripted_server
from tests.workflows.benchmark.scripted_server import Reply, failure

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = (ROOT / "deploy" / "Containerfile").read_text()
UNIT = ROOT / "deploy" / "llamita@.service"


def instructions(name: str) -> list[str]:
    """The arguments of each instruction of a name in the Containerfile, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", CONTAINERFILE)
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


def served(arguments: Sequence[str]) -> ServeConfig:
    """What `llamita serve` understands by its arguments."""

    def keep(config: ServeConfig) -> ServeConfig:
        return config

    result: ServeConfig = parse_and_call(keep, "llamita serve", arguments, "")
    return result


def test_the_container_serves_every_address_at_the_port_that_it_exposes() -> None:
    command = json.loads(instructions("ENTRYPOINT")[0]) + json.loads(instructions("CMD")[0])
    assert command[:2] == ["llamita", "serve"]
    config = served(command[2:])
    assert (config.model, config.host, str(config.port)) == (Path("/model"), "0.0.0.0", instructions("EXPOSE")[0])
    assert int(instructions("USER")[0]) > 0


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (Reply([b'{"status":"ok"}'], content_type="application/json"), 0),
        (failure(503, "draining"), 1),
        (None, 1),  # no server
    ],
)
def test_the_containers_health_check_follows_the_servers(reply: Reply | None, status: int) -> None:
    command = json.loads(instructions("HEALTHCHECK")[0].split(" CMD ", 1)[1])
    assert command[:2] == ["python", "-c"]
    with scripted_server.serving(lambda seen: reply or failure(500, "")) as server:
        place = server.url if reply is not None else "http://127.0.0.1:1"
        assert command[2].count("http://127.0.0.1:8000") == 1
        code = command[2].replace("http://127.0.0.1:8000", place)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert done.returncode == status
    assert [seen.path for seen in server.seen] == (["/health"] if reply is not None else [])


@pytest.mark.medium
def test_the_package_is_built_from_what_the_container_copies(tmp_path: Path) -> None:
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than pyproject.toml asks for")
    copied = [arguments.split() for arguments in instructions("COPY") if not arguments.startswith("--from")]
    for *sources, target in copied:
        for source in sources:
            place = tmp_path / "source" / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run([*command, "-w", str(tmp_path)], cwd=tmp_path / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert sources <= names
    (extra,) = re.findall(r'"\.\[(\w+)\]"', instructions("RUN")[1])
    text = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert f"Provides-Extra: {extra}\n" in text


def test_the_unit_starts_the_server_and_lets_it_drain() -> None:
    lines = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if re.match(r"\w+=", line))
    given = {
        "${LLAMITA_MODEL}": "/srv/model",
        "%i": "8001",
        "${CREDENTIALS_DIRECTORY}": "/run/credentials",
        "$LLAMITA_OPTIONS": "--hosts llm.example.org --max-sequences 8",
    }
    command = lines["ExecStart"]
    for name, value in given.items():
        assert name in command
        command = command.replace(name, value)
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("/opt/llamita/bin/llamita", "serve")
    config = served(arguments)
    assert (config.model, config.port, config.host) == (Path("/srv/model"), 8001, "127.0.0.1")
    assert config.api_key_file == Path("/run/credentials/api-keys")
    assert (config.hosts, config.running.engine.max_sequences) == (("llm.example.org",), 8)
    assert int(lines["TimeoutStopSec"]) > ServerLimits().drain_seconds


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "llamita@8001.service"
    unit.write_text(UNIT.read_text().replace("/opt/llamita/bin/llamita", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(unit.name) not in done.stderr  # warnings, such as of a setting that does not exist


def test_nginx_and_the_server_agree_on_their_limits() -> None:
    text = (ROOT / "deploy" / "nginx.conf").read_text()

    def seconds(name: str) -> float:
        (found,) = re.findall(rf"^ *{name} (\d+)s;", text, re.MULTILINE)
        return float(found)

    limits = ServerLimits()
    assert re.findall(r"client_max_body_size (\d+)m;", text) == [str(limits.max_body_bytes >> 20)]
    assert seconds("proxy_read_timeout") > limits.request_seconds
    assert seconds("proxy_read_timeout") > seconds("proxy_next_upstream_timeout")
    upstream = text[text.index("upstream llamita") : text.index("server {")]
    assert float(re.findall(r"keepalive_timeout (\d+)s;", upstream)[0]) < limits.idle_seconds
    assert limits.heartbeat_seconds < seconds("proxy_read_timeout")
