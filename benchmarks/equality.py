"""Greedy tokens of one engine against transformers, and exact logits against each request's alone, on a trained model.

Prompts of 1 to several hundred tokens, cut from a validation text, are served together from a memory so small that
sequences are preempted again and again. Compared with transformers' greedy `generate`: tokens must be equal wherever
its two best logits differ by more than twice the largest difference between both libraries' logits for that text;
after a first divergence, texts differ and are not compared. In the exact mode, each logit is compared bit for bit.

    python benchmarks/equality.py MODEL TEXT [--prompts 200] [--tokens 96] [--longest 300] [--blocks 0]
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import TorchRunner, load_runner
from llamita.backend.torch.infer.sampling import Sampler
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.storage import model_directory
from llamita.text.tokenizer import Tokenizer

BLOCK = 4  # positions: sequences ask for memory often, and so are often preempted

Text = tuple[int, ...]
Rows = dict[tuple[int, int], list[np.ndarray]]  # logits by request and position, as often as they were computed


@dataclasses.dataclass
class Divergence:
    """The first token at which a text differs, and whether the margin allowed it."""

    request: int
    position: int
    gap: float  # between transformers' two best logits there
    difference: float  # largest between both libraries' logits for the text

    @property
    def allowed(self) -> bool:
        return self.gap <= 2 * self.difference


@dataclasses.dataclass
class Equality:
    """What a comparison found."""

    prompts: int
    shortest: int
    longest: int
    tokens: int
    preemptions: int
    equal_texts: int
    divergences: list[Divergence]
    largest_difference: float  # between both libraries' logits, as a share of the largest logit
    wide: float  # share of the tokens whose margin is clear
    exact_tokens: int
    exact_preemptions: int
    exact_differences: int

    @property
    def holds(self) -> bool:
        return all(one.allowed for one in self.divergences) and self.exact_differences == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="what the prompts are cut from, in UTF-8")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--longest", type=int, default=300, help="prompt, if the model's positions suffice for it")
    parser.add_argument("--blocks", type=int, default=0, help="of 4 positions; 0: the longest sequence's alone")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    directory = model_directory.resolve_model_directory(arguments.model)
    tokenizer = Tokenizer.load(directory)
    tokens = tokenizer.encode(arguments.text.read_text(encoding="utf-8")[:400_000])
    runner = load_runner(directory, dtype="float32", device="cpu")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    longest = min(arguments.longest, runner.config.max_position_embeddings - arguments.tokens)
    prompts = mixed_prompts(tokens, arguments.prompts, longest, bos)
    started = time.perf_counter()
    show(compare(directory, prompts, arguments.tokens, arguments.blocks))
    print(f"in {time.perf_counter() - started:.0f} s, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip


def mixed_prompts(tokens: Sequence[int], count: int, longest: int, bos: Sequence[int] = ()) -> list[Text]:
    """Stretches of a text, 1 to `longest` tokens with the BOS, as many of 1 to 2 as of 128 to 256."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.uniform(0, np.log(longest), count)).round().astype(int)
    lengths[:2] = 1, longest
    starts = random.integers(0, len(tokens) - longest, count)
    return [(*bos, *tokens[start : start + length])[:length] for start, length in zip(starts, lengths, strict=True)]


def compare(directory: Path, prompts: Sequence[Text], count: int, blocks: int = 0) -> Equality:
    """Serve the prompts together, fast and exactly, and hold both to what they are held to."""
    runner = load_runner(directory, dtype="float32", device="cpu")
    exact = load_runner(directory, exact=True)
    blocks = blocks or -(-(max(map(len, prompts)) + count) // BLOCK)
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    texts, _, engine = serve(runner, prompts, count, blocks)
    divergences, largest, wide, equal = [], 0.0, [], 0
    for number, (prompt, ours) in enumerate(zip(prompts, texts, strict=True)):
        theirs = greedy(peer, prompt, count)
        with torch.inference_mode():
            their_logits_TV = peer(torch.tensor([theirs])).logits[0].numpy()
        logits_TV = runner.forward([theirs])["logits"][0]
        difference = float(np.abs(logits_TV - their_logits_TV).max())
        largest = max(largest, difference / float(np.abs(their_logits_TV).max()))
        best_two_T2 = np.sort(their_logits_TV, axis=-1)[len(prompt) - 1 : -1, -2:]
        gaps_T = best_two_T2[:, 1] - best_two_T2[:, 0]
        wide += (gaps_T > 2 * difference).tolist()
        equal += ours == theirs
        if ours != theirs:
            first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            divergences.append(Divergence(number, first, float(gaps_T[first - len(prompt)]), difference))

    exact_texts, rows, exact_engine = serve(exact, prompts, count, blocks)
    differences = 0
    for number, prompt in enumerate(prompts):
        (text,), alone, _ = serve(exact, [prompt], count, -(-(len(prompt) + count) // BLOCK))
        differences += text != exact_texts[number]
        for (_, position), (row_V,) in alone.items():
            differences += sum(not np.array_equal(row_V, other_V) for other_V in rows[number, position])
    return Equality(
        prompts=len(prompts),
        shortest=min(map(len, prompts)),
        longest=max(map(len, prompts)),
        tokens=len(prompts) * count,
        preemptions=engine.scheduler.preemptions,
        equal_texts=equal,
        divergences=divergences,
        largest_difference=largest,
        wide=float(np.mean(wide)),
        exact_tokens=len(rows),
        exact_preemptions=exact_engine.scheduler.preemptions,
        exact_differences=differences,
    )


def serve(runner: TorchRunner, prompts: Sequence[Text], count: int, blocks: int) -> tuple[list[Text], Rows, Engine]:
    """All prompts in one engine over so many blocks: whole texts, and in the exact mode the logits drawn from."""
    engine = Engine(runner, eos_token_ids=(), config=EngineConfig(block_size=BLOCK, blocks=blocks))
    rows: Rows = {}
    for number, prompt in enumerate(prompts):
        # the seed says whose logits a row is; nothing is drawn by it
        engine.add(Request(number, prompt, SamplingParams(temperature=0, max_tokens=count, seed=number)))
    texts = [list(prompt) for prompt in prompts]
    sample = Sampler.sample

    def keep(sampler, logits_RV, specs, *rest):  # type: ignore[no-untyped-def]
        for spec, row_V in zip(specs, logits_RV, strict=True):
            rows.setdefault((spec.seed, spec.position), []).append(row_V.numpy().copy())
        return sample(sampler, logits_RV, specs, *rest)

    try:
        if runner.exact:
            Sampler.sample = keep  # type: ignore[method-assign]
        while engine.has_work:
            for event in engine.step():
                assert event.token_id is not None, event.error
                texts[event.request_id].append(event.token_id)
    finally:
        Sampler.sample = sample  # type: ignore[method-assign]
    return [tuple(text) for text in texts], rows, engine


def greedy(peer: torch.nn.Module, prompt: Text, count: int) -> Text:
    """transformers' own greedy text, never ended early."""
    prompt_1T = torch.tensor([prompt])
    with torch.inference_mode():
        return tuple(
            peer.generate(
                prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=count, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )[0].tolist()
        )  # fmt: skip


def show(found: Equality) -> None:
    print(f"| prompts | {found.prompts}, of {found.shortest} to {found.longest} tokens |\n|---|---|")
    print(f"| tokens generated | {found.tokens:,} |")
    print(f"| preemptions | {found.preemptions} |")
    print(f"| texts equal to transformers' | {found.equal_texts} |")
    print(f"| largest difference of logits, relative | {found.largest_difference:.1e} |")
    print(f"| tokens whose margin is clear | {found.wide:.2%} |")
    print(f"| divergences where the margin is clear | {sum(not one.allowed for one in found.divergences)} |")
    print(f"| exact: rows of logits compared | {found.exact_tokens:,} |")
    print(f"| exact: preemptions | {found.exact_preemptions} |")
    print(f"| exact: rows that differ from those alone | {found.exact_differences} |")
    for one in found.divergences[:10]:
        verdict = "allowed" if one.allowed else "NOT ALLOWED"
        print(
            f"request {one.request} diverges at position {one.position}, where the two best logits differ by", end=" "
        )
        print(f"{one.gap:.1e} and both libraries by {one.difference:.1e}: {verdict}")
    print("holds" if found.holds else "DOES NOT HOLD")


if __name__ == "__main__":
    main()
