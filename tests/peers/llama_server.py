#!/usr/bin/env python3
"""Starts `llamita serve` under the flags of llama.cpp's llama-server, so that its suite of tests can run against us.

Each flag is translated, or it changes nothing that a client sees (threads, batches, ...), or it is refused by its name.
LLAMITA_PEER_MODEL is the model directory that is served for every model of the suite, which are downloads. Context,
temperature and their like, which llama-server takes as flags, are written into a copy of its configuration.

    LLAMITA_PEER_MODEL=stories LLAMA_SERVER_BIN_PATH=tests/peers/llama_server.py pytest unit/test_basic.py
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMES = (
    "gpt-3.5-turbo", "gpt-3.5-turbo-instruct", "gpt-4.1", "davinci-002", "codellama70b", "text-embedding-3-small",
    "test",
)  # fmt: skip
"""Names by which the suite asks for the model: llama-server answers to any, we to those we are given."""
WITHOUT_EFFECT = {
    "--offline": 0, "--no-slots": 0, "--metrics": 0, "--embedding": 0, "--cont-batching": 0, "--kv-unified": 0,
    "--jinja": 0, "--no-jinja": 0, "--no-mmproj": 0, "--no-cache-idle-slots": 0, "--hf-repo": 1, "--hf-file": 1,
    "--model-url": 1, "--batch-size": 1, "--ubatch-size": 1, "--threads": 1, "--n-gpu-layers": 1, "-fa": 1, "-ctk": 1,
    "-ctv": 1, "--seed": 1, "--n-predict": 1, "--cache-ram": 1,
}  # fmt: skip
"""Flags that say how to compute, or choose a default that requests here choose; each with its number of values."""
VALUES = {"--reasoning-format": ("deepseek", "auto"), "--reasoning": ("auto",), "--pooling": ("mean", "last")}
"""Flags of which some values are possible."""


@dataclass
class Asked:
    """What the flags ask for."""

    arguments: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    temperature: float = 1.0
    context: int = 0
    slots: int = 1


def main() -> None:
    os.execv(sys.executable, [sys.executable, "-m", "llamita.cli.main", *translated(sys.argv[1:])])


def translated(flags: Sequence[str]) -> list[str]:
    """Returns the arguments of `llamita` that do what llama-server's flags ask for; ends where there are none."""
    model = Path(os.environ.get("LLAMITA_PEER_MODEL", ""))
    if not (model / "config.json").is_file():
        raise SystemExit("LLAMITA_PEER_MODEL is not set to a model directory; set it to the model to serve")
    asked = read_flags(flags)
    name, *others = asked.names or [model.name]
    aliases = [alias for alias in (*others, *NAMES) if alias != name]
    serve = ["serve", str(configured(model, asked)), "--name", name, "--alias", *aliases]
    return [*serve, "--max-sequences", str(asked.slots), *asked.arguments]


def read_flags(flags: Sequence[str]) -> Asked:
    """Returns what llama-server's flags ask for; ends with a message for one that has no counterpart."""
    asked, rest = Asked(), iter(flags)
    for flag in rest:
        if flag in WITHOUT_EFFECT:
            for _ in range(WITHOUT_EFFECT[flag]):
                next(rest)
        elif flag in VALUES:
            value = next(rest)
            if value not in VALUES[flag]:
                raise SystemExit(f"{flag} {value} has no counterpart here")
            asked.arguments += ["--pooling", value] if flag == "--pooling" else []
        else:
            translate(flag, rest, asked)
    return asked


def translate(flag: str, rest: Iterator[str], asked: Asked) -> None:
    """Reads the value of a flag that has a counterpart."""
    if flag in ("--host", "--port"):
        asked.arguments += [flag, next(rest)]
    elif flag == "--alias":
        asked.names = next(rest).split(",")
    elif flag == "--temp":
        asked.temperature = float(next(rest))
    elif flag == "--ctx-size":
        asked.context = int(next(rest))
    elif flag == "--parallel":
        asked.slots = int(next(rest))
    elif flag == "--api-key":
        os.environ["LLAMITA_API_KEY"] = next(rest)
    elif flag == "--verbose":
        asked.arguments += ["--log-level", "debug"]
    elif flag == "--chat-template":
        asked.arguments += ["--template", named_template(next(rest))]
    elif flag == "--chat-template-file":
        asked.arguments += ["--template", next(rest)]
    else:
        raise SystemExit(f"{flag} has no counterpart here")


def named_template(template: str) -> str:
    """Returns a template that is built in here too; ends with a message for another of llama-server's."""
    if template not in ("chatml",):
        raise SystemExit(f"--chat-template {template!r:.60} has no counterpart here")
    return template


def configured(model: Path, asked: Asked) -> Path:
    """Returns a directory of the model with the context that a slot of llama-server has, and its temperature."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    if asked.context:
        config["max_position_embeddings"] = asked.context // asked.slots
    place = Path(tempfile.mkdtemp(prefix="llama-server-"))
    for file in model.resolve().iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (place / file.name).symlink_to(file)
    (place / "config.json").write_text(json.dumps(config))
    (place / "generation_config.json").write_text(json.dumps({"temperature": asked.temperature}))
    return place


if __name__ == "__main__":
    main()
