"""Several parameters of a checkpoint in one parameter of the module, since one large product is faster than three."""

from dataclasses import dataclass

from torch import Tensor, nn

from llamita.model.parameters import canonical_names as canonical_names


@dataclass(frozen=True)
class FusedParameter:
    """A parameter of the module and the canonical parameters whose rows it stacks (one, where nothing is fused)."""

    name: str
    parameter: nn.Parameter
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    weight_decay: bool

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Returns views of `tensor`, shaped like the parameter, one for each part."""
        return tensor.split(self.sizes) if len(self.sizes) > 1 else (tensor,)  # a DTensor would be gathered
