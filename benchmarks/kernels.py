"""Decoding, prefill and batches beside llama.cpp in one run, over the same weights in 16, 8 and 4 bits.

    python benchmarks/kernels.py [--presets stories-15m stories-110m qwen2-0.5b] [--files MODEL.gguf] [--sampled]

A preset has random weights; llama.cpp quantises its float32 file to q8_0 and q4_0, which both programs then open, and
has it as f16 and bf16 too, of which the faster counts. Passes alternate between the programs, so that a change in the
machine's speed meets both; ratios are taken pass by pass. Tokens are the likeliest, or with `--sampled` drawn at a
temperature of 0.8 from the 40 likeliest and of these from 95% of the mass, by each program's own sampler. Both take as
many threads as PyTorch does. The share of memory read is that of the weights' bytes, by the reading speed measured in
the same pass.
"""

import argparse
import logging
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path[0] = str(Path(__file__).resolve().parents[1])

import llama_cpp  # noqa: E402
from benchmarks.exports import quantized_by_llama_cpp  # noqa: E402
from benchmarks.inference import GREEDY, READ_BYTES, Ours, read_bandwidth  # noqa: E402

from llamita.backend.sampling_params import SamplingParams  # noqa: E402
from llamita.backend.torch.infer.kernels.choice import choose_kernels  # noqa: E402
from llamita.backend.torch.infer.runner import load_runner  # noqa: E402
from llamita.backend.torch.model.weights import build_model, to_host_arrays  # noqa: E402
from llamita.data import meadow  # noqa: E402
from llamita.model.presets import preset  # noqa: E402
from llamita.storage.formats.foreign import ForeignModel  # noqa: E402
from llamita.storage.formats.gguf import write_model  # noqa: E402
from llamita.text.bpe import train_bpe_from_iterator  # noqa: E402

PROMPT, LONG_PROMPT, TOKENS, BATCH, POSITIONS = 32, 512, 48, 16, 1024
SAMPLED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95)
MEASUREMENTS = ("decode alone", f"a batch of {BATCH}", f"prefill of {LONG_PROMPT}")


class LlamaCpp:
    """A GGUF file in llama.cpp, greedy or sampled."""

    def __init__(self, file: Path, threads: int, sampled: bool) -> None:
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp cannot open {file}"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = BATCH * 128, BATCH
        options.n_batch = options.n_ubatch = LONG_PROMPT
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(LONG_PROMPT, 0, 1)
        self.samplers = [sampler(number) for number in range(BATCH)] if sampled else []

    def close(self) -> None:
        for each in self.samplers:
            llama_cpp.llama_sampler_free(each)
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def measure(self) -> tuple[float, ...]:
        return self.decode(1), self.decode(BATCH), self.prefill()

    def decode(self, count: int) -> float:
        self._forget()
        prompts = [np.random.default_rng(number).integers(1000, size=PROMPT).tolist() for number in range(count)]
        last = []
        for number, prompt in enumerate(prompts):
            self._run([(token, place, number) for place, token in enumerate(prompt)], [PROMPT - 1])
            last.append(self._next(PROMPT - 1, number))
        started = time.perf_counter()
        for step in range(TOKENS):
            self._run([(token, PROMPT + step, number) for number, token in enumerate(last)], range(count))
            last = [self._next(number, number) for number in range(count)]
        return count * TOKENS / (time.perf_counter() - started)

    def prefill(self) -> float:
        self._forget()
        started = time.perf_counter()
        self._run([(place % 1000, place, 0) for place in range(LONG_PROMPT)], [LONG_PROMPT - 1])
        self._next(LONG_PROMPT - 1, 0)
        return LONG_PROMPT / (time.perf_counter() - started)

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _run(self, tokens, wanted) -> None:
        """Tokens as (id, position, sequence); `wanted` are those after which logits are computed."""
        self.batch.n_tokens = len(tokens)
        for place, (token, position, sequence) in enumerate(tokens):
            self.batch.token[place], self.batch.pos[place] = token, position
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, sequence
            self.batch.logits[place] = place in wanted
        assert llama_cpp.llama_decode(self.context, self.batch) == 0

    def _next(self, place: int, number: int) -> int:
        if self.samplers:
            return int(llama_cpp.llama_sampler_sample(self.samplers[number], self.context, place))
        logits = llama_cpp.llama_get_logits_ith(self.context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


def sampler(seed: int) -> Any:
    """llama.cpp's sampler of `SAMPLED`."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for step in (
        llama_cpp.llama_sampler_init_top_k(SAMPLED.top_k),
        llama_cpp.llama_sampler_init_top_p(SAMPLED.top_p, 1),
        llama_cpp.llama_sampler_init_temp(SAMPLED.temperature),
        llama_cpp.llama_sampler_init_dist(seed),
    ):
        llama_cpp.llama_sampler_chain_add(chain, step)
    return chain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=["stories-15m", "stories-110m", "qwen2-0.5b"])
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="GGUF files, opened by both as they are")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--sampled", action="store_true", help="draw each token, rather than take the likeliest")
    arguments = parser.parse_args()
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    print(
        f"{processor_name()}, {torch.get_num_threads()} threads, kernels {choose_kernels().instructions}, "
        f"torch {torch.__version__}, llama-cpp-python {llama_cpp.__version__}"
    )
    for file in arguments.files:
        compare(file.name, {"as it is": [file]}, {"as it is": file}, arguments)
    for name in arguments.presets:
        with tempfile.TemporaryDirectory() as directory:
            files = written(name, Path(directory))
            theirs = {"16 bits": [files["f16"], files["bf16"]], "8 bits": [files["q8_0"]], "4 bits": [files["q4_0"]]}
            ours = {"16 bits": files["bf16"], "8 bits": files["q8_0"], "4 bits": files["q4_0"]}
            compare(name, theirs, ours, arguments)


def processor_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())


def written(name: str, directory: Path) -> dict[str, Path]:
    """A preset's random weights in each kind of file."""
    config = preset(name, max_position_embeddings=POSITIONS, eos_token_id=None)
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, 100, "train"), 300)  # without one llama.cpp opens no file
    model = ForeignModel(config, to_host_arrays(build_model(config)), tokenizer)
    files = {kind: directory / f"{kind}.gguf" for kind in ("f32", "f16", "bf16", "q8_0", "q4_0")}
    for kind in ("f32", "f16", "bf16"):
        write_model(files[kind], model, kind)
    for kind in ("q8_0", "q4_0"):
        quantized_by_llama_cpp(files["f32"], files[kind], kind)
    return files


def compare(name: str, theirs: dict[str, list[Path]], ours: dict[str, Path], arguments: argparse.Namespace) -> None:
    sampling = SAMPLED if arguments.sampled else GREEDY
    data, threads = torch.ones(READ_BYTES // 4), torch.get_num_threads()
    table = Table(box=None, title=f"{name}: tokens/s, medians (lowest - highest)", title_justify="left")
    for column in ("", "measured", "here", "in llama.cpp", "here / there", "of memory read"):
        table.add_column(column, justify="left" if column in ("", "measured") else "right")
    for form, file in ours.items():
        mine = Ours(load_runner(file), sampling)
        others = [LlamaCpp(other, threads, arguments.sampled) for other in theirs[form]]
        found, rivals, shares = [], [], []
        for number in range(arguments.passes + 1):  # the first warms up
            bandwidth = max(read_bandwidth(data) for _ in range(3))
            each = (mine.decode(1, TOKENS), mine.decode(BATCH, TOKENS), mine.prefill(LONG_PROMPT))
            other = [rival.measure() for rival in others]
            if number:
                found.append(each)
                rivals.append(tuple(max(column) for column in zip(*other, strict=True)))
                shares.append(each[0] * mine.bytes_per_token / bandwidth)
        for place, what in enumerate(MEASUREMENTS):
            here, there = ([values[place] for values in side] for side in (found, rivals))
            ratios = [a / b for a, b in zip(here, there, strict=True)]
            share = f"{statistics.median(shares):.0%}" if place == 0 else ""
            table.add_row(form if place == 0 else "", what, *map(spread, (here, there, ratios)), share)
        for rival in others:
            rival.close()
        del mine
    Console(width=160).print(table)


def spread(values: list[float]) -> str:
    digits = 2 if statistics.median(values) < 20 else 0
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
