"""Llamita: train, adapt, check and serve small Llama-family language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamita.library import load, save

__version__ = "0.1.0"
__all__ = ["__version__", "load", "save"]


def __getattr__(name: str) -> Any:
    """`load` and `save` are found when they are asked for, so that `import llamita` loads no framework."""
    if name in ("load", "save"):
        from llamita import library

        return getattr(library, name)
    raise AttributeError(f"module 'llamita' has no attribute {name!r}")
