"""Writes a text with the model in `model/` (or another directory) and what you have written: no framework runs.

python run.py --prompt "One rainy morning," --tokens 60 --temperature 0.8
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from config import read_config
from generate import generate, greedy, sample
from tokenizers import Tokenizer
from weights import read_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("model"), help="a Llama's directory")
    parser.add_argument("--prompt", default="One rainy morning,")
    parser.add_argument("--tokens", type=int, default=60, help="how many at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = read_config(arguments.model)
    weights = read_weights(arguments.model)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    generator = np.random.default_rng(arguments.seed)

    def choose(logits: np.ndarray) -> int:
        if arguments.temperature == 0:
            return int(greedy(logits))
        return int(sample(logits, arguments.temperature, np.array(generator.random())))

    prompt = [*first_tokens(arguments.model, tokenizer), *tokenizer.encode(arguments.prompt).ids]
    ids, shown, began = list(prompt), "", time.monotonic()
    for token in generate(config, weights, prompt, arguments.tokens, choose, last_tokens(arguments.model)):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # the bytes of a character that is not yet whole
            print(text[len(shown) :], end="", flush=True)
            shown = text
    seconds, count = time.monotonic() - began, len(ids) - len(prompt)
    print(f"{tokenizer.decode(ids)[len(shown) :]}\n\n{count} tokens, {count / seconds:.1f} a second")


def first_tokens(directory: Path, tokenizer: Tokenizer) -> list[int]:
    """The token that begins a text, where the tokenizer does not put it there itself but the model is used to it.

    A tokenizer of Llamita's says in its settings that it adds nothing; its models' texts all begin with `<s>`.
    """
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    own = all(settings.get(key) is False for key in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"))
    return [tokenizer.token_to_id(settings["bos_token"])] if own else []


def last_tokens(directory: Path) -> set[int]:
    """The tokens that end a text."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if content.get("eos_token_id") is not None:
            found = content["eos_token_id"]
            return set(found) if isinstance(found, list) else {found}
    return set()


if __name__ == "__main__":
    main()
