"""The flags of verbs that open a model to generate with it: `generate` and `chat`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from llamita.backend.interface import BackendName
from llamita.cli.own_code import backend_with
from llamita.inference.config import EngineConfig

if TYPE_CHECKING:
    from llamita.inference.drafting import Drafter
    from llamita.learn.own_model import Use


@dataclass(frozen=True)
class LoadConfig:
    """The arguments of `LLM.load` besides the model itself and its adapters, and whose code runs it."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache; auto: that of the file."""
    backend: BackendName = "auto"
    """The framework that computes; auto: MLX on Apple silicon where it is installed, else PyTorch."""
    device: Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|gpu")] = "auto"
    """cpu or cuda with PyTorch, cpu or gpu with MLX; auto: a GPU where there is one."""
    threads: int = 0
    """Threads on a CPU (PyTorch alone); 0: the framework's choice."""
    exact: bool = False
    """Give the same bits whatever else runs beside: PyTorch in float32 on the CPU, slower."""
    draft: str = ""
    """Guess tokens ahead (speculative decoding), which changes the speed but no token: lookup, or a smaller model of
    the same vocabulary."""
    own_code: Annotated[Path | None, tyro.conf.arg(name="with")] = None
    """The folder of a course (min-llama, serving or numpy), whose code runs the model in the place of the library's
    (float32, slower)."""
    engine: EngineConfig = EngineConfig()

    def arguments(self, use: "Use" = "generate") -> dict[str, Any]:
        """Returns the arguments of `LLM.load`; ValueError where a check of the code for this use does not pass."""
        found = {name: value for name, value in vars(self).items() if name != "own_code"}
        if self.own_code is not None:
            found["backend"] = backend_with(self.own_code, use, self.backend, self.device, self.threads)
            if self.draft not in ("", "lookup"):  # the library guesses, and the course's code judges
                found["draft"] = self._draft_model()
        return found

    def _draft_model(self) -> "Drafter":
        from llamita.backend.choice import load_backend
        from llamita.inference.drafting import DraftModel

        backend = load_backend("torch", device=self.device, threads=self.threads)
        return DraftModel(backend.load_runner(self.draft, self.dtype, self.device, self.threads))


def template_source(template: str | None) -> str | None:
    """Returns a template's source where a file was given, else its name."""
    if template is not None and Path(template).is_file():
        return Path(template).read_text("utf-8")
    return template
