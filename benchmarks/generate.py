"""Decoding at batch 1, tokens a second: the engine against transformers' generate, in float32 and bfloat16.

Random weights, greedy, no end-of-sequence token. Passes alternate, so that a change in the machine's speed meets all;
the memory bandwidth is measured in the same passes, and the engine's share of it is taken pass by pass. Both sides
count the tokens after the first, whose time is prefill's: the engine by its own clock, transformers by the difference
of two generations of different length.

    python benchmarks/generate.py [--presets stories-15m stories-110m] [--passes 5] [--tokens 64]
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from llamita import checkpoint, files
from llamita.inference.llm import LLM
from llamita.inference.request import SamplingParams
from llamita.presets import preset
from llamita.torch_backend.runner import DTYPES, load_runner
from llamita.torch_backend.weights import build_model, to_host_arrays

PROMPT = tuple(range(100, 132))
READ_BYTES = 512 * 2**20  # far beyond the caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["stories-15m", "stories-110m"])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    for name in arguments.presets:
        with tempfile.TemporaryDirectory() as directory:
            measure(name, Path(directory) / "model", arguments.passes, arguments.tokens)
        gc.collect()


def measure(name: str, directory: Path, passes: int, tokens: int) -> None:
    config = preset(name)
    with files.atomic_directory(directory) as temporary:
        checkpoint.save_tensors(temporary, to_host_arrays(build_model(config)))
        checkpoint.save_config(temporary, config)
    contenders: dict[str, Callable[[], tuple[float, float]]] = {}
    for dtype in ("float32", "bfloat16"):
        contenders[f"llamita {dtype}"] = engine(directory, dtype, tokens)
        contenders[f"transformers {dtype}"] = peer(directory, dtype, tokens)
    data = torch.ones(READ_BYTES // 4)

    speeds: dict[str, list[float]] = {contender: [] for contender in contenders}
    shares: dict[str, list[float]] = {contender: [] for contender in contenders}
    bandwidths = []
    for number in range(passes + 1):  # the first warms up
        bandwidth = max(read_bandwidth(data) for _ in range(3))
        for contender, run in contenders.items():
            speed, bytes_a_second = run()
            if number:
                speeds[contender].append(speed)
                shares[contender].append(bytes_a_second / bandwidth)
        if number:
            bandwidths.append(bandwidth)

    print(f"\n{name}: {tokens} tokens after a prompt of {len(PROMPT)}; median of {passes} passes (lowest - highest)")
    print(f"  memory read: {statistics.median(bandwidths) / 1e9:.1f} GB/s ({spread(bandwidths, 1e-9)})")
    for contender, values in speeds.items():
        line = f"  {contender:<22} {statistics.median(values):7.1f} tokens/s ({spread(values)})"
        if contender.startswith("llamita"):
            rival = speeds[contender.replace("llamita", "transformers")]
            ratio = statistics.median(a / b for a, b in zip(values, rival, strict=True))
            line += f"; {ratio:.2f}x transformers; {statistics.median(shares[contender]):.0%} of the memory read"
        print(line)


def engine(directory: Path, dtype: str, tokens: int) -> Callable[[], tuple[float, float]]:
    """A run of the engine: tokens a second, and bytes of weights and cache read a second."""
    llm = LLM.load(directory, lambda path: load_runner(path, dtype=dtype, device="cpu"))
    params = SamplingParams(temperature=0, max_tokens=tokens + 1, ignore_eos=True)

    def run() -> tuple[float, float]:
        result = llm.generate(PROMPT, params).statistics
        assert result.decode_tokens == tokens
        return result.decode_tokens_per_second, result.decode_bytes_per_second

    return run


def peer(directory: Path, dtype: str, tokens: int) -> Callable[[], tuple[float, float]]:
    """The same by transformers: the time of tokens + 1 new ones less the time of one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype]).eval()
    prompt = torch.tensor([PROMPT])

    def seconds(count: int) -> float:
        start = time.perf_counter()
        length = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).shape[1]
        assert length == len(PROMPT) + count
        return time.perf_counter() - start

    def run() -> tuple[float, float]:
        with torch.inference_mode():
            return tokens / (seconds(tokens + 1) - seconds(1)), 0.0

    return run


def read_bandwidth(data: torch.Tensor) -> float:
    """Bytes a second of summing an array that no cache holds, by all threads."""
    start = time.perf_counter()
    data.sum()
    return data.numel() * data.element_size() / (time.perf_counter() - start)


def spread(values: list[float], scale: float = 1) -> str:
    return f"{min(values) * scale:.1f} - {max(values) * scale:.1f}"


if __name__ == "__main__":
    main()
