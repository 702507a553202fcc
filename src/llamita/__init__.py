"""Llamita: train, adapt, check and serve small Llama-family language models.

From Python:

    import llamita

    model = llamita.load("runs/stories")
    print(model.generate("Once upon a time", llamita.SamplingParams(max_tokens=50, seed=1)).text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamita.backend.sampling_params import SamplingParams
    from llamita.inference.config import EngineConfig
    from llamita.inference.llm import LLM
    from llamita.inference.request import Generation

    load = LLM.load
    save = LLM.save

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "Generation", "SamplingParams", "__version__", "load", "save"]

_HOMES = {
    "EngineConfig": "inference.config",
    "Generation": "inference.request",
    "LLM": "inference.llm",
    "SamplingParams": "backend.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are asked for, so that `import llamita` loads no framework."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"llamita.{_HOMES[name]}"), name)
    if name in ("load", "save"):
        return getattr(__getattr__("LLM"), name)
    raise AttributeError(f"module 'llamita' has no attribute {name!r}")
