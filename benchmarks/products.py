"""What bounds inference on a CPU: a model's matrix products by the number of rows, and attention to a prompt.

    python benchmarks/products.py [--presets stories-110m qwen2-0.5b] [--dtype auto] [--passes 5]

All products of one step with weights as they are and reordered, taking turns with a sum over an array that no cache
holds: milliseconds, the share of the memory read, and the share of the best product of large square matrices. Then
attention of a prompt to itself by PyTorch's kernel and by tiles of queries.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from llamita.backend import processor
from llamita.backend.torch.devices import fast_few_rows
from llamita.backend.torch.infer.runner import DTYPES
from llamita.backend.torch.model import attention, reordered
from llamita.backend.torch.model.llama import Linear
from llamita.backend.torch.model.weights import build_model
from llamita.model.config import ModelConfig
from llamita.model.presets import preset
from quantized import READ_BYTES, read_bandwidth, seconds

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
SQUARE = 2048
PROMPTS = (64, 128, 512, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["stories-110m", "qwen2-0.5b"])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    arguments = parser.parse_args()
    if arguments.dtype == "auto":
        arguments.dtype = "bfloat16" if processor.multiplies("bfloat16") else "float32"
    dtype = DTYPES[arguments.dtype]
    if not reordered.can_reorder(dtype):
        raise SystemExit(f"oneDNN reorders no weights of {arguments.dtype} on this processor")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}")
    console = Console()
    with torch.inference_mode():
        for name in arguments.presets:
            config = preset(name)
            console.print(products(name, config, dtype, arguments.passes))
            console.print(prompts(name, config, dtype, arguments.passes))


def products(name: str, config: ModelConfig, dtype: torch.dtype, passes: int) -> Table:
    """Every product of a step of so many tokens; the output head's for at most 16 of them."""
    model = build_model(config, dtype=dtype)
    plain = [module.weight for module in model.modules() if isinstance(module, Linear)]
    plain = [weight for weight in plain if weight is not model.head.weight_VD] + [model.head.weight_VD]
    relaid = [reordered.reorder(weight) for weight in plain]
    inputs = {weight.shape[1]: torch.randn(ROWS[-1], weight.shape[1], dtype=dtype) for weight in plain}
    data, square = torch.ones(READ_BYTES // 4), torch.randn(SQUARE, SQUARE, dtype=dtype)
    table = Table(title=f"{name}: all products of a step", title_justify="left")
    for column in ("rows", "plain, ms", "reordered, ms", "times as fast", "of the memory read", "of the best product"):
        table.add_column(column, justify="right")
    for rows in ROWS:
        count = [rows] * (len(plain) - 1) + [min(rows, 16)]

        def step(multiply: Callable[..., torch.Tensor], weights: list[torch.Tensor], count: list[int] = count) -> float:
            return better_of_two(
                lambda: [multiply(inputs[w.shape[1]][:n], w) for n, w in zip(count, weights, strict=True)]
            )

        found = []
        for _ in range(passes + 1):  # the first warms up
            with fast_few_rows(torch.device("cpu"), dtype, rows):
                before = step(F.linear, plain)
            peak = 2 * SQUARE**3 / better_of_two(lambda: square @ square)
            found.append((before, step(reordered.linear, relaid), read_bandwidth(data), peak))
        found = found[1:]
        size = sum(weight.nbytes for weight in plain)
        work = sum(2 * weight.numel() * n for weight, n in zip(plain, count, strict=True))
        table.add_row(
            str(rows),
            f"{statistics.median(before for before, *_ in found) * 1e3:.1f}",
            f"{statistics.median(after for _, after, *_ in found) * 1e3:.1f}",
            f"{statistics.median(before / after for before, after, *_ in found):.2f}",
            f"{statistics.median(size / after / read for _, after, read, _ in found):.0%}",
            f"{statistics.median(work / after for _, after, *_ in found) / max(peak for *_, peak in found):.0%}",
        )
    return table


def prompts(name: str, config: ModelConfig, dtype: torch.dtype, passes: int) -> Table:
    """One layer's attention of a prompt to itself, keys and values as the engine has them."""
    table = Table(title=f"{name}: attention of a prompt in one layer", title_justify="left")
    for column in ("positions", "PyTorch's kernel, ms", "by tiles, ms", "times as fast"):
        table.add_column(column, justify="right")
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for length in PROMPTS:
        q, k, v = (torch.randn(length, heads, H, dtype=dtype).transpose(0, 1)[None] for heads in (N, K, K))
        found = []
        for _ in range(passes + 1):
            wide = [x.repeat_interleave(N // K, dim=1) for x in (k, v)]
            kernel = better_of_two(lambda q=q, wide=wide: F.scaled_dot_product_attention(q, *wide, is_causal=True))
            found.append((kernel, better_of_two(lambda q=q, k=k, v=v: attention.attention_by_query_tiles(q, k, v))))
        found = found[1:]
        columns = [statistics.median(each) * 1e3 for each in zip(*found, strict=True)]
        ratio = statistics.median(kernel / tiles for kernel, tiles in found)
        table.add_row(str(length), *(f"{value:.2f}" for value in columns), f"{ratio:.2f}")
    return table


def better_of_two(call: Callable[[], object]) -> float:
    return min(seconds(call), seconds(call))


if __name__ == "__main__":
    main()
