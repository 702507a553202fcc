"""What `--with` costs: the processor time of texts by the code of courses' folders, beside the library's own.

    OMP_NUM_THREADS=1 python benchmarks/own_code.py MODEL --with my-llama my-server numpy-llama [--tokens 48]

In float32 on one core, at temperature 0; each is the least of some passes, none of which finds its prompt in the prefix
cache. Prints seconds for one text, for one whose tokens the same model guesses ahead in the library's code, and for
four texts that are served together. Fails where a token differs.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llamita.backend.choice import load_backend
from llamita.backend.interface import Backend
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.own.backend import OwnBackend
from llamita.inference.drafting import DraftModel
from llamita.inference.llm import LLM
from llamita.learn.own_model import checked_program

PROMPTS = ["Once upon a time", "The capital of France is", "def f(x):", "Water boils"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--with", type=Path, nargs="+", required=True, dest="directories")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    library = load_backend("torch", device="cpu", threads=1)
    backends: dict[str, Backend] = {"nothing": library}
    backends |= {str(place): OwnBackend(checked_program(place, "generate")) for place in arguments.directories}
    table = Table(title=f"{arguments.model}: {arguments.tokens} tokens, seconds", title_justify="left")
    for column in ("--with", "one text", "with guesses", "four texts"):
        table.add_column(column, justify="left" if column == "--with" else "right")
    expected: dict[str, list[list[int]]] = {}
    for name, backend in backends.items():
        plain = LLM.load(arguments.model, backend=backend, dtype="float32", device="cpu")
        drafter = DraftModel(library.load_runner(arguments.model, "float32", "cpu", 1))
        guessing = LLM(plain.runner, plain.tokenizer, drafter=drafter)
        seconds = []
        for llm, prompts in ((plain, PROMPTS[:1]), (guessing, PROMPTS[:1]), (plain, PROMPTS)):
            least, texts = least_seconds(llm, prompts, arguments.tokens, arguments.passes)
            assert expected.setdefault(str(prompts), texts) == texts, f"{name} writes other tokens"
            seconds.append(f"{least:.1f}")
        table.add_row(name, *seconds)
    Console(width=120).print(table)


def least_seconds(llm: LLM, prompts: list[str], tokens: int, passes: int) -> tuple[float, list[list[int]]]:
    """Returns the processor time of the fastest pass, and the texts as tokens."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    found = []
    for _ in range(passes):
        llm.engine.manager.forget_unused()
        begun = time.process_time()
        texts = llm.generate(prompts, params)
        found.append(time.process_time() - begun)
    return min(found), [list(text.token_ids) for text in texts]


if __name__ == "__main__":
    main()
