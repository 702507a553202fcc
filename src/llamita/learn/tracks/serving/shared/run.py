"""Writes with the model in `model/` and what is written in this folder.

python run.py --prompt "Once upon a time"                   after the lessons up to generate
python run.py --prompt "Once upon a time" --without-cache   after the lessons up to sampling
python run.py --prompt "One day" --prompt "In the garden"   several prompts: after batching
python run.py --prompt "One day" --bits 4                   after quantize
python run.py --prompt "One day" --paged                    after paged
python run.py --prompt "One day" --prompt "One day in May" --prefix   after prefix
python run.py --prompt "One day" --draft SMALLER_MODEL      after speculative
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batch import Batcher
from generate import generate, simple_generate
from kv_cache import KvCache
from paged_cache import PagePool, new_paged_caches
from prefix_cache import PrefixCache
from quantize import quantize_weights
from sampler import make_sampler
from speculative import speculative_generate
from tokenizers import Tokenizer

from load import load
from model import Model

PAGE_SIZE = 16
GROUP_SIZE = 32
OF_LLAMITA = {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
"""Settings of tokenizers that Llamita trains. They leave out the token that begins a text, which its models expect; in
others the tokenizer puts it there by itself, if the model wants one."""


@dataclass
class Loaded:
    """A model with its tokenizer, the tokens that begin a text, and those that end one."""

    model: Model
    tokenizer: Tokenizer
    begin: list[int]
    eos_ids: set[int]


def main(arguments: Sequence[str] | None = None) -> list[str]:
    options = read_options(arguments)
    loaded = opened(options.model, options.bits)
    prompts = [loaded.begin + loaded.tokenizer.encode(prompt).ids for prompt in options.prompt]
    began = time.perf_counter()
    tokens = written(loaded, prompts, options)
    seconds = time.perf_counter() - began
    texts = [loaded.tokenizer.decode([*prompt, *new]) for prompt, new in zip(prompts, tokens, strict=True)]
    print("\n\n".join(texts))
    count = sum(map(len, tokens))
    print(f"[{count} tokens in {seconds:.1f} s, {count / seconds:.1f} a second]")
    return texts


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", required=True, help="a beginning; may be given several times")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model", help="a model directory")
    parser.add_argument("--max-tokens", type=int, default=60, help="the most new tokens of a prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a prompt that are read in a step")
    parser.add_argument("--without-cache", action="store_true", help="run the whole text for every token")
    parser.add_argument("--batch-size", type=int, default=4, help="prompts that run together")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="bits of a weight, in groups of 32")
    parser.add_argument("--paged", action="store_true", help="keep the caches in pages")
    parser.add_argument("--prefix", action="store_true", help="share pages of common beginnings; one prompt at a time")
    parser.add_argument("--draft", type=Path, help="a smaller model with the same tokenizer, which guesses ahead")
    options = parser.parse_args(arguments)
    if options.draft and options.temperature > 0:
        raise SystemExit("run.py: --draft writes at temperature 0 only: leave out --temperature, or leave out --draft")
    return options


def written(loaded: Loaded, prompts: list[list[int]], options: argparse.Namespace) -> list[list[int]]:
    """Returns the new tokens of each prompt, by the way of writing that the options ask for."""
    model, eos_ids = loaded.model, loaded.eos_ids
    sampler = make_sampler(options.temperature, options.top_k, options.top_p, options.min_p, options.seed)
    if options.without_cache:
        return [simple_generate(model, prompt, sampler, options.max_tokens, eos_ids) for prompt in prompts]
    if options.draft:
        draft = opened(options.draft, None)
        pairs = ((caches_of(model)(), caches_of(draft.model)()) for _ in prompts)
        return [
            speculative_generate(model, draft.model, prompt, *pair, options.max_tokens, eos_ids=eos_ids)
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]
    longest = max(map(len, prompts)) + options.max_tokens
    new_caches = caches_of(model)
    if options.paged or options.prefix:
        config, pages = model.config, len(prompts) * (longest // PAGE_SIZE + 1)
        pool = PagePool(config.num_hidden_layers, pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        if options.prefix:
            return with_prefixes(loaded, prompts, pool, sampler, options)
        new_caches = partial(new_paged_caches, pool)
    if len(prompts) == 1:
        return [generate(model, prompts[0], new_caches(), sampler, options.max_tokens, eos_ids, options.chunk)]
    batcher = Batcher(model, new_caches, sampler, options.batch_size, options.chunk, eos_ids)
    requests = [batcher.add(prompt, options.max_tokens) for prompt in prompts]
    batcher.run()
    return [request.tokens for request in requests]


def with_prefixes(
    loaded: Loaded, prompts: list[list[int]], pool: PagePool, sampler: Any, options: argparse.Namespace
) -> list[list[int]]:
    """Writes one prompt after the other; each reads only what no text before it began with."""
    cache, results = PrefixCache(pool), []
    for prompt in prompts:
        pages = cache.match(prompt)
        caches = new_paged_caches(pool, pages)
        print(f"[{len(pages) * PAGE_SIZE} of {len(prompt)} tokens of this prompt are in the cache]")
        rest = prompt[len(pages) * PAGE_SIZE :]
        new = generate(loaded.model, rest, caches, sampler, options.max_tokens, loaded.eos_ids, options.chunk)
        table = caches[0].table
        cache.insert([*prompt, *new][: caches[0].offset], table.pages)
        table.release()
        results.append(new)
    return results


def opened(directory: Path, bits: int | None) -> Loaded:
    """Returns the model of a directory; with bits, the matrices of its layers are quantised."""
    config, weights = load(directory)
    if bits:
        matrices = [name for name in weights if name.endswith("_proj.weight")]
        matrices = [name for name in matrices if weights[name].shape[1] % GROUP_SIZE == 0]
        weights |= {name: quantize_weights(weights[name], GROUP_SIZE, bits) for name in matrices}
    config_file, generation, of_tokenizer = (
        read_json(directory / name) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    eos = generation.get("eos_token_id", config_file.get("eos_token_id"))
    eos_ids = set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    bos = generation.get("bos_token_id", config_file.get("bos_token_id"))
    begins = of_tokenizer.items() >= OF_LLAMITA.items() and bos is not None
    return Loaded(Model(config, weights), tokenizer, [bos] if begins else [], eos_ids)


def read_json(path: Path) -> dict[str, Any]:
    """Returns what is in a file; nothing where there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def caches_of(model: Model) -> Callable[[], list[Any]]:
    """Returns a function that gives empty caches, one for each layer of the model."""
    return lambda: [KvCache() for _ in model.blocks]


if __name__ == "__main__":
    main()
