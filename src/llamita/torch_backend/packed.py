"""Which parameters of a checkpoint lie in one parameter of the module, since one large product is faster than three."""

from dataclasses import dataclass

from torch import Tensor, nn

# Which canonical linear maps lie in one matrix, one below the other.
PACKING = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class PackedParameter:
    """A parameter of the module and the canonical parameters whose rows it stacks (one, where nothing is packed)."""

    name: str
    parameter: nn.Parameter
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    weight_decay: bool

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of `tensor`, shaped like the parameter, one for each part."""
        return tensor.split(self.sizes)


def canonical_names(name: str) -> tuple[str, ...]:
    """The parameters of a checkpoint that a parameter of the module holds."""
    for packed, parts in PACKING.items():
        if f".{packed}." in name:
            module = packed.rpartition(".")[0]
            return tuple(name.replace(packed, f"{module}.{part}") for part in parts)
    return (name,)
