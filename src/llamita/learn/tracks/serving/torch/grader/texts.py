"""PyTorch's words, of which the lines of the solutions are made: mistakes.py changes these lines in both frameworks."""

LIB = "torch"
TENSOR, CAT = "torch.tensor", "torch.cat"
AXIS, KEEP = "dim", "keepdim=True"
MAX, MIN = "amax", "amin"
SWAP, TO = "transpose", "to"
HIDDEN = 'float("-inf")'
FREQUENCIES = "-torch.arange(0, dims, 2).float() / dims"
ANGLES = "torch.arange(seq_len).float()"
TURNS = "self.cos, self.sin = angles.cos(), angles.sin()"
EXCHANGED_TURNS = "self.sin, self.cos = angles.cos(), angles.sin()"
CAUSAL = 'torch.zeros(L, S, dtype=dtype).masked_fill(hidden, float("-inf"))'
CAUSAL_LARGE = "torch.zeros(L, S, dtype=dtype).masked_fill(hidden, -1e4)"
CAUSAL_ONES = "torch.zeros(L, S, dtype=dtype).masked_fill(~hidden, 1.0)"
CAUSAL_WIDE = 'torch.zeros(L, S).masked_fill(hidden, float("-inf"))'
GROUP_MASK = "mask.expand(*batch, heads, L, S).reshape(*batch, H, heads // H, L, S)"
GROUP_MASK_TILED = "mask.expand(*batch, heads, L, S).reshape(*batch, heads // H, H, L, S).transpose(-4, -3)"
ORDERED = "ordered = p.gather(-1, order)"
BEFORE = "before = (ordered.cumsum(dim=-1) - ordered).gather(-1, places)"
UPTO = "before = ordered.cumsum(dim=-1).gather(-1, places)"
UNORDERED = "before = p.cumsum(dim=-1) - p"
REST = "(p - q).clamp(min=0)"
WHERE_SEEN = 'torch.zeros(seen.shape, dtype={}.dtype).masked_fill(~seen, float("-inf"))'
NOTHING_HIDDEN = "torch.zeros(seen.shape, dtype={}.dtype)"
PADDED = "torch.nn.functional.pad(x, (0, 0, 0, S - x.shape[2]))"
PADDED_BEFORE = "torch.nn.functional.pad(x, (0, 0, S - x.shape[2], 0))"
TABLE = "block_table.clamp(min=0)"
IN_MEMORY_ORDER = "torch.arange(M).expand(N, M)"
FIRST_TABLE = "block_table[:1].clamp(min=0).expand(N, M)"
GATHERED_PAGES = "memory[torch.tensor(self.table.pages)]"
REVERSED_TABLE = "block_table.clamp(min=0).flip(1)"
REVERSED_VALUE = "value.flip(-2)"
ENDS_FROM_LAST = "probabilities.flip(-1).cumsum(dim=-1)"


def wide(x: str) -> str:
    """Returns the line that makes float32 of x."""
    return f"{x}.float()"
