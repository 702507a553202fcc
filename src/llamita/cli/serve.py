"""`llamita serve`: puts a model behind HTTP: OpenAI's and Anthropic's APIs, and a page to talk to it."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from llamita.cli.loading import LoadConfig, template_source
from llamita.server.settings import ServerLimits

KEYS_VARIABLE = "LLAMITA_API_KEY"


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model over HTTP, to any OpenAI or Anthropic client and to a browser."""

    model: tyro.conf.Positional[Path]
    """A model directory, a training run (then its best checkpoint), a GGUF file, or a name on the hub (owner/name)."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is every one of this machine."""
    port: int = 8000
    """The port; 0: one that is free."""
    name: str = ""
    """The name by which clients ask for the model; left out: that of its directory or file."""
    alias: tuple[str, ...] = ()
    """Further names for it, for clients that ask for a fixed one, such as gpt-4o-mini."""
    template: str | None = None
    """The chat template, instead of the model's own or where it has none: chatml, r0, plain, plain-eos, or a file of
    Jinja."""
    adapter: tuple[str, ...] = ()
    """Adapters to serve beside the model, NAME=PATH each; clients ask for one by its name."""
    pooling: Literal["mean", "last"] = "mean"
    """How embeddings are made of a text's states, where a request does not say."""
    api_key_file: Path | None = None
    """A file of API keys, a line each; LLAMITA_API_KEY may hold one too. Without any, everybody who can reach the
    address may ask."""
    hosts: tuple[str, ...] = ()
    """Names of this machine that clients use, beside localhost and IP addresses; * allows every name."""
    origins: tuple[str, ...] = ()
    """Sites whose pages may ask from a browser, such as https://example.org."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe lines that are logged; info writes one for each request, without its prompt."""
    limits: ServerLimits = ServerLimits()
    running: LoadConfig = LoadConfig()


def run(config: ServeConfig) -> int:
    from llamita.cli.generate import named_paths
    from llamita.progress import ProgressBar
    from llamita.server import run as running
    from llamita.server.app import create_app
    from llamita.server.model import labels_texts, open_model

    keys = api_keys(config)
    if not keys and not running.is_loopback(config.host):
        print(
            f"note: {config.host} can be reached by others, and no API key is asked for; --api-key-file sets some",
            file=sys.stderr,
        )
    listener = running.bind(config.host, config.port)  # a port in use is known before a model is read
    options = config.running.arguments("classify" if labels_texts(config.model) else "generate")
    with ProgressBar(f"opening {config.model.name}"):
        model = open_model(
            config.model,
            name=config.name,
            aliases=config.alias,
            template=template_source(config.template),
            pooling=config.pooling,
            adapters=named_paths(config.adapter),
            **options,
        )
    app = create_app(model, config.limits, api_keys=keys, hosts=config.hosts, origins=config.origins)
    running.log_to_stderr(config.log_level)

    def ready(address: str) -> None:
        print(f"serving {model.name} at {address} (Ctrl-C ends)", file=sys.stderr, flush=True)

    return running.serve(app, listener, ready)


def api_keys(config: ServeConfig) -> list[str]:
    """Returns the keys of the file and of the environment; ValueError for a file without any."""
    keys = [os.environ[KEYS_VARIABLE]] if os.environ.get(KEYS_VARIABLE) else []
    if config.api_key_file is not None:
        lines = [line.strip() for line in config.api_key_file.read_text("utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"{config.api_key_file} holds no API key; write one a line")
        keys += found
    return keys
