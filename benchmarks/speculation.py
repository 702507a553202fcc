"""What guessing ahead brings: how many guesses are right, and the speed beside the same engine without.

    python benchmarks/speculation.py MODEL --prompts prompts.txt [--draft SMALLER] [--cut-to 20 10] [--passes 3]

Prompts are the lines of a file, cut to their first 32 tokens; one request at a time, greedy and at temperature 1.
`--cut-to` makes drafts out of the model itself: its first and its last layers, so many in all, those between left out.
Passes alternate; ratios are taken pass by pass. That the tokens are the same is checked in the exact mode first.
"""

import argparse
import re
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import llamita
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.llm import LLM
from llamita.storage import model_directory

PROMPT_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--draft", default="")
    parser.add_argument("--cut-to", type=int, nargs="+", default=[])
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        drafts = {"the last tokens' earlier place": "lookup"}
        drafts |= {arguments.draft: arguments.draft} if arguments.draft else {}
        for layers in arguments.cut_to:
            drafts[f"{layers} of its layers"] = str(cut(arguments.model, layers, Path(directory) / str(layers)))
        measure(arguments, drafts)


def measure(arguments: argparse.Namespace, drafts: dict[str, str]) -> None:
    plain = llamita.load(arguments.model)
    assert plain.tokenizer is not None, "the prompts are text"
    lines = [line for line in arguments.prompts.read_text("utf-8").splitlines() if len(line) > 4 * PROMPT_TOKENS]
    prompts = [plain.encode(line)[:PROMPT_TOKENS] for line in lines[: arguments.requests]]
    table = Table(
        title=f"{arguments.model}: {len(prompts)} requests of {arguments.tokens} tokens", title_justify="left"
    )
    for column in ("guesses", "a step", "temperature", "right", "tokens a step", "x without", "spread"):
        table.add_column(column, justify="left" if column == "guesses" else "right")
    for temperature in (0.0, 1.0):
        check(arguments, drafts.values(), prompts, temperature)
        for name, draft in drafts.items():
            for count in arguments.draft_tokens:
                other = llamita.load(arguments.model, engine=EngineConfig(draft_tokens=count), draft=draft)
                ratios, totals = [], [0, 0, 0]
                for number in range(arguments.passes + 1):  # the first warms up
                    base, _ = run(plain, prompts, arguments.tokens, temperature)
                    speed, totals = run(other, prompts, arguments.tokens, temperature)
                    ratios += [speed / base] if number else []
                generated, drafted, accepted = totals
                table.add_row(
                    name,
                    str(count),
                    f"{temperature:g}",
                    f"{accepted / max(drafted, 1):.0%} of {drafted}",
                    f"{generated / (generated - accepted):.2f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{min(ratios):.2f} - {max(ratios):.2f}",
                )
    Console(width=140).print(table)


def run(
    llm: LLM, prompts: list[tuple[int, ...]], tokens: int, temperature: float
) -> tuple[float, tuple[int, int, int]]:
    """Tokens a second of decoding, and how many tokens were generated, guessed, and guessed right."""
    seconds, generated, drafted, accepted = 0.0, 0, 0, 0
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=tokens, ignore_eos=True)
        found = llm.generate(prompt, params).statistics
        seconds += found.decode_seconds
        generated, drafted = generated + found.decode_tokens, drafted + found.drafted_tokens
        accepted += found.accepted_tokens
    return generated / seconds, (generated, drafted, accepted)


def cut(model: Path, layers: int, output: Path) -> Path:
    """Writes a model of the first and the last layers of another, as many of both."""
    source = model_directory.resolve_model_directory(model)
    config = model_directory.load_config(source)
    all_layers = range(config.num_hidden_layers)
    kept = [*all_layers[: layers - layers // 2], *all_layers[config.num_hidden_layers - layers // 2 :]]
    places = {number: place for place, number in enumerate(kept)}
    arrays = {}
    for name, array in model_directory.load_tensors(source).items():
        number = re.match(r"model\.layers\.(\d+)\.", name)
        if number is None:
            arrays[name] = array
        elif int(number[1]) in places:
            arrays[name.replace(number[0], f"model.layers.{places[int(number[1])]}.")] = array
    output.mkdir()
    model_directory.save_config(output, replace(config, num_hidden_layers=layers), next(iter(arrays.values())).dtype)
    model_directory.save_tensors(output, arrays)
    return output


def check(
    arguments: argparse.Namespace, drafts: Iterable[str], prompts: list[tuple[int, ...]], temperature: float
) -> None:
    """The tokens in the exact mode, with and without guesses."""
    said = []
    for draft in ("", *drafts):
        llm = llamita.load(arguments.model, exact=True, draft=draft)
        params = [
            SamplingParams(temperature=temperature, seed=seed, max_tokens=arguments.tokens, ignore_eos=True)
            for seed in range(len(prompts))
        ]
        said.append([one.token_ids for one in llm.generate(prompts, params)])
    assert all(one == said[0] for one in said), "a guess changed a token"
    print(f"temperature {temperature:g}: the same {sum(map(len, said[0]))} tokens with and without guesses")


if __name__ == "__main__":
    main()
