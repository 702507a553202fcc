"""Llamita as an application of Ray Serve: replicas of one server, on one machine or many, behind Ray's proxy.

    pip install "ray[serve]"
    serve run --app-dir deploy ray_serve:application model=runs/quickstart/run replicas=2

Each replica is a process of its own with the model, its engine and its queue; Ray starts another where one dies or is
no longer healthy. What a request meets is what `llamita serve` gives it, but for the bounds on connections and slow
clients, which belong to the HTTP server: here that is Ray's proxy. A key in LLAMITA_API_KEY is asked for, as there.
"""

import os
import sys

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import cloudpickle, serve
from ray.serve import Application

from llamita.cli.loading import LoadConfig
from llamita.inference.config import EngineConfig
from llamita.server.app import create_app
from llamita.server.model import open_model
from llamita.server.settings import ServerLimits

# This file travels to the replicas, whatever machine they run on; Llamita must be installed there.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Settings(BaseModel):
    """What `serve run` takes as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """A model directory, a training run or a GGUF file, at the same place on each machine, or a name on the hub."""
    name: str = ""
    """The name by which clients ask for the model; left out: that of its directory or file."""
    replicas: int = Field(1, ge=1)
    gpus: float = Field(0, ge=0)
    """GPUs of each replica; 0.5 puts two on one."""
    threads: int = Field(0, ge=0)
    """Threads of each replica on a CPU; 0: one for each CPU that Ray counts for it."""
    cpus: float = Field(1, ge=0)
    """CPUs that Ray counts for each replica."""
    max_sequences: int = Field(EngineConfig.max_sequences, ge=1)
    """Requests that a replica runs at once."""
    hosts: str = ""
    """Names by which clients ask, with commas between them, beside localhost and IP addresses; * allows every name."""


class Replica:
    """What Ray asks a replica about itself."""

    app: FastAPI
    """Set by Ray, to what `build` below returned."""

    def check_health(self) -> None:
        """Raises where the engine failed or hangs; Ray then replaces the replica."""
        if fault := self.app.state.serving.fault:
            raise RuntimeError(fault)


def application(settings: Settings) -> Application:
    """Returns the application that Ray deploys: requests go to the replica with the fewest under way."""
    limits = ServerLimits()
    keys = [key for key in [os.environ.get("LLAMITA_API_KEY")] if key]

    def build() -> FastAPI:
        options = LoadConfig(
            threads=settings.threads or max(1, int(settings.cpus)),
            engine=EngineConfig(max_sequences=settings.max_sequences),
        )
        model = open_model(settings.model, name=settings.name, adapters={}, **vars(options))
        hosts = [host.strip() for host in settings.hosts.split(",") if host.strip()]
        return create_app(model, limits, api_keys=keys, hosts=hosts)

    deployment = serve.deployment(
        serve.ingress(build)(Replica),
        name="llamita",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # More than a replica takes: so that it is the replica that refuses (429, with Retry-After), and not a queue in
        # Ray's proxy, of which its metrics know nothing.
        max_ongoing_requests=limits.max_connections,
        graceful_shutdown_timeout_s=limits.drain_seconds,
        health_check_period_s=10,
        health_check_timeout_s=30,
    )
    return deployment.bind()
