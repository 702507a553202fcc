"""Time and memory of loading a model of Qwen2-0.5B's shape (random weights, bfloat16), beside transformers.

    python benchmarks/load.py

The directory is written once to a temporary place. Each contestant loads it in processes of its own, in turns; imports
are not timed. Prints seconds (median and spread), the ratio, and the peak of memory as a multiple of the weights.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llamita.backend.torch.model import weights
from llamita.model.presets import preset
from llamita.storage import files, model_directory

CONTESTANTS = {
    "llamita": (
        "from llamita.backend.torch.infer.runner import load_runner",
        "model = load_runner(sys.argv[1])",
    ),
    "transformers": (
        "from transformers import AutoModelForCausalLM",
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')",
    ),
}
CODE = """
import pathlib, sys, time, torch
{imports}
peak = lambda: int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024
before = peak()
started = time.perf_counter()
{load}
print(time.perf_counter() - started, peak() - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2-0.5b")
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    memory: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        config = preset(arguments.preset)
        model = weights.build_model(config, dtype=torch.bfloat16)
        with files.atomic_directory(directory) as written:
            model_directory.save_config(written, config, "BF16")
            model_directory.save_tensors(written, weights.to_host_arrays(model))
        size = sum(parameter.numel() for parameter in model.parameters()) * 2
        del model
        for number in range(-1, arguments.passes):
            for name, (imports, load) in CONTESTANTS.items():
                code = CODE.format(imports=imports, load=load)
                command = [sys.executable, "-W", "ignore", "-c", code, str(directory)]
                took, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                if number >= 0:  # the first pass brings the file into the page cache
                    seconds[name].append(float(took))
                    memory[name].append(float(peak) / size)
    table = Table(title=f"loading {arguments.preset}, {size / 1e9:.2f} GB in bfloat16")
    for column in ("", "seconds", "spread", "x transformers", "peak memory / weights"):
        table.add_column(column, justify="right" if column else "left")
    for name in CONTESTANTS:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["transformers"], strict=True))
        spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
        took = f"{statistics.median(seconds[name]):.2f}"
        table.add_row(name, took, spread, f"{ratio:.2f}", f"{statistics.median(memory[name]):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
