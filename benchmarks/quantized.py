"""Decoding at batch 1 with weights in bfloat16, int8 and int4: tokens a second, and the share of the memory bandwidth.

Random weights, greedy, through the engine. Passes alternate, so that a change in the machine's speed meets all three;
the memory bandwidth is measured in the same passes. With --products, the products alone: the kernels of few rows beside
a matrix-matrix product of dequantised weights, by the number of rows, which tells where to change over.

    python benchmarks/quantized.py [--presets stories-110m qwen2-0.5b] [--passes 5] [--tokens 48]
    python benchmarks/quantized.py --products
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import runner_over
from llamita.backend.torch.model import quantize
from llamita.backend.torch.model.weights import build_model, quantize_arrays, to_host_arrays
from llamita.inference.llm import LLM
from llamita.model.presets import preset

SCHEMES = ("bfloat16", "int8", "int4")
PROMPT = tuple(range(100, 132))
READ_BYTES = 512 * 2**20  # far beyond the caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["stories-110m", "qwen2-0.5b"])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--products", action="store_true", help="time the products alone, by the number of rows")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if arguments.products:
        return products(arguments.passes)
    for name in arguments.presets:
        decoding(name, arguments.passes, arguments.tokens)
        gc.collect()


def decoding(name: str, passes: int, tokens: int) -> None:
    config = preset(name)
    arrays = to_host_arrays(build_model(config, dtype=torch.bfloat16))
    engines = {"bfloat16": LLM(runner_over(config, arrays, "bfloat16"))}
    for scheme in SCHEMES[1:]:
        shape = replace(config, quantization=scheme)
        engines[scheme] = LLM(runner_over(shape, dict(quantize_arrays(shape, arrays.items())), "bfloat16"))
    params = SamplingParams(temperature=0, max_tokens=tokens + 1, ignore_eos=True)
    data = torch.ones(READ_BYTES // 4)
    speeds: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
    shares: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
    for number in range(passes + 1):  # the first warms up
        bandwidth = max(read_bandwidth(data) for _ in range(3))
        for scheme, llm in engines.items():
            result = llm.generate(PROMPT, params).statistics
            if number:
                speeds[scheme].append(result.decode_tokens_per_second)
                shares[scheme].append(result.decode_bytes_per_second / bandwidth)
    print(f"\n{name}: {tokens} tokens after a prompt of {len(PROMPT)}; median of {passes} passes (lowest - highest)")
    for scheme, values in speeds.items():
        ratios = [speed / base for speed, base in zip(values, speeds["bfloat16"], strict=True)]
        print(
            f"  {scheme:<9} {statistics.median(values):7.1f} tokens/s ({spread(values, 1)}); "
            f"{statistics.median(ratios):.2f}x bfloat16 ({spread(ratios, 2)}); "
            f"{statistics.median(shares[scheme]):.0%} of the memory read",
            flush=True,
        )


def products(passes: int) -> None:
    """Times of the packed product over those of the dequantising one: below 1, the kernel is faster."""
    for C, D in ((4096, 768), (768, 2048), (32000, 768), (9728, 896)):
        weight_CD = torch.randn(C, D)
        for bits in (8, 4):
            values, scale = quantize.quantize(weight_CD, bits)
            kernel_values = values if bits == 8 else quantize.to_blocks(values)
            kernel_scale = scale if bits == 8 else quantize.scales_and_zeros(scale)
            product = quantize.int8_product if bits == 8 else quantize.int4_product
            line = []
            for M in (1, 4, 8, 12, 16, 24, 32, 64):
                x_MD = torch.randn(M, D).bfloat16()

                def packed(x_MD=x_MD, product=product, values=kernel_values, scale=kernel_scale) -> None:
                    product(x_MD, values, scale)

                def dequantized(x_MD=x_MD, bits=bits, values=kernel_values, scale=scale, D=D) -> None:
                    if bits == 8:
                        F.linear(x_MD, quantize.dequantize(values, scale, D, torch.bfloat16))
                    else:
                        F.linear(x_MD, quantize.dequantize_blocks(values, scale, torch.bfloat16))

                ratios = [seconds(packed) / seconds(dequantized) for _ in range(passes + 1)][1:]
                line.append(f"{M}: {statistics.median(ratios):.2f}")
            print(f"{C} x {D}, int{bits}: time of the kernel over the dequantised product, by rows: {', '.join(line)}")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def read_bandwidth(data: torch.Tensor) -> float:
    """Bytes a second of summing an array that no cache holds, by all threads."""
    return data.numel() * data.element_size() / seconds(lambda: data.sum())


def spread(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f} - {max(values):.{digits}f}"


if __name__ == "__main__":
    main()
