"""A published model learns a task with checkable answers: right answers before and after each kind of tuning.

    python benchmarks/adaptation.py MODEL --output DIRECTORY

The task: an order in a sentence, to be answered as JSON of four keys; an answer counts where it is right to the
letter. A short instruction tuning with LoRA leaves mistakes; from there the model is tuned further on pairs of the
right answer and one of its own wrong ones (DPO), and on its answers with 1 for a right one (RL), each with LoRA. What
each gives is merged and written as float32, and answers held-out orders here, in transformers and in llama.cpp. Stages
whose directories are there already are not run again.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import llamita
from llamita.backend.sampling_params import SamplingParams
from llamita.cli.main import main as run_llamita
from llamita.inference.llm import LLM
from llamita.text.chat import Chat

NAMES = ("Ada", "Ben", "Carla", "Dev", "Eva", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mira", "Olga")
ITEMS = ("apples", "books", "chairs", "drums", "eggs", "flutes", "hats", "jars", "kites", "lamps", "mirrors", "spoons")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SENTENCES = (
    "On {day}, {name} needs {number} {item}.",
    "Please send {number} {item} to {name}; they are needed on {day}.",
    "{name} would like {number} {item} by {day}.",
    "We promised {name} {number} {item}, to be there on {day}.",
    "{number} {item} for {name}, not later than {day}.",
    "By {day} there should be {number} {item} at the house of {name}.",
)
INSTRUCTION = "Write this order as JSON with name, item, count and day: "
LONGEST_ANSWER = 48
PAIRS = 300
"""Orders that the model answers, to learn from those that are wrong."""
COMPARED = 20
"""Orders that the other programs answer too, one after the other."""

Order = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--orders", type=int, default=1200)
    parser.add_argument("--held-out", type=int, default=50)
    parser.add_argument("--sft-steps", type=int, default=6)
    parser.add_argument("--dpo-steps", type=int, default=30)
    parser.add_argument("--rl-steps", type=int, default=6)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    held_out, orders = write_data(arguments.output, arguments.orders, arguments.held_out)
    models = {"as it came": arguments.model} | tuned(arguments, orders)
    few = held_out[:COMPARED]
    table = Table(box=None, title=f"right of {len(held_out)} held-out orders; elsewhere of {len(few)}")
    for column in ("model", "here", "in transformers", "in llama.cpp", "the same three answers"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, model in models.items():
        directory, file = written(model, arguments.output / f"{model.stem}-written")
        mine, *others = here(directory, held_out), in_transformers(directory, few), in_llama_cpp(directory, file, few)
        same = sum(len(set(three)) == 1 for three in zip(mine[: len(few)], *others, strict=True))
        table.add_row(name, *(str(rights(answers, held_out)) for answers in (mine, *others)), str(same))
    Console().print(table)


def rights(answers: Sequence[str], orders: Sequence[Order]) -> int:
    return sum(said == wanted(order) for said, order in zip(answers, orders, strict=False))


def write_data(output: Path, count: int, held_out: int) -> tuple[list[Order], list[Order]]:
    """Writes the files that tuning reads; returns orders of which none is in them, and those that are."""
    chance = random.Random(0)
    orders: dict[str, Order] = {}
    while len(orders) < count + held_out:
        number = chance.randrange(len(NUMBERS))
        order: Order = {"name": chance.choice(NAMES), "item": chance.choice(ITEMS), "count": number + 1}
        order["day"] = chance.choice(DAYS)
        text = chance.choice(SENTENCES).format(number=NUMBERS[number], **order)
        orders.setdefault(text, {"text": text[0].upper() + text[1:], **order})
    made = list(orders.values())
    train = made[held_out:]
    conversations = [{"messages": [*asked(order), {"role": "assistant", "content": wanted(order)}]} for order in train]
    prompts = [{"prompt": asked(order), "answer": wanted(order)} for order in train]
    write_lines(output / "conversations.jsonl", conversations)
    write_lines(output / "prompts.jsonl", prompts)
    return made[:held_out], train


def write_lines(file: Path, records: Sequence[Order]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def asked(order: Order) -> list[dict[str, str]]:
    return [{"role": "user", "content": INSTRUCTION + order["text"]}]


def wanted(order: Order) -> str:
    return json.dumps({key: order[key] for key in ("name", "item", "count", "day")})


def write_pairs(file: Path, model: Path, orders: Sequence[Order]) -> None:
    """Writes the orders that a model, drawing its answers, answers wrongly: beside the right answer, its own."""
    llm = llamita.load(model, backend="torch", device="cpu")
    params = [SamplingParams(max_tokens=LONGEST_ANSWER, seed=number) for number in range(len(orders))]
    answers = [generation.text for generation in llm.generate(_prompts(llm, orders), params)]
    wrong = [(order, said) for order, said in zip(orders, answers, strict=True) if said != wanted(order)]
    write_lines(file, [{"prompt": asked(o), "chosen": wanted(o), "rejected": said} for o, said in wrong])


def _prompts(llm: LLM, orders: Sequence[Order]) -> list[tuple[int, ...]]:
    assert llm.tokenizer is not None, "a directory has its tokenizer"
    chat = Chat(llm.tokenizer)
    return [tuple(chat.encode(asked(order), add_generation_prompt=True).tokens) for order in orders]


def tuned(arguments: argparse.Namespace, orders: Sequence[Order]) -> dict[str, Path]:
    """The merged models by the name of their tuning."""
    output: Path = arguments.output
    lora = ("--tuning", "lora", "--lora-rank", 8)
    found = {}

    def stage(name: str, verb: str, model: Path, *options: Any) -> Path:
        if not (output / verb).is_dir():
            _llamita(verb, "--model", model, "--output", output / f"{verb}-run", *options)
            _llamita("merge", output / f"{verb}-run", "--output", output / verb)
        found[name] = output / verb
        return output / verb

    data = ("--data", output / "conversations.jsonl", "--steps", arguments.sft_steps, "--learning-rate", 1e-3)
    sft = stage("after SFT", "sft", arguments.model, *lora, *data, "--batch-size", 16, "--mode", "pad")
    if not (output / "pairs.jsonl").is_file():
        write_pairs(output / "pairs.jsonl", sft, orders[:PAIRS])
    data = ("--data", output / "pairs.jsonl", "--steps", arguments.dpo_steps, "--learning-rate", 5e-5)
    stage("after SFT and DPO", "dpo", sft, *lora, *data, "--batch-size", 8)
    data = ("--data", output / "prompts.jsonl", "--steps", arguments.rl_steps, "--learning-rate", 3e-4)
    rules = ("--reward", "exact", "--max-tokens", LONGEST_ANSWER, "--group", 8, "--batch-size", 64)
    stage("after SFT and RL", "rl", sft, *lora, *data, *rules)
    return found


def _llamita(*arguments: Any) -> None:
    if status := run_llamita([str(argument) for argument in arguments]):
        raise SystemExit(status)


def written(model: Path, output: Path) -> tuple[Path, Path]:
    """The model as a directory in float32 and as a GGUF file of float32."""
    directory, file = output / "directory", output / "model.gguf"
    if not file.is_file():
        _llamita(
            "convert",
            model,
            directory,
        )
        _llamita("convert", directory, file, "--to", "gguf-f32")
    return directory, file


def here(directory: Path, orders: Sequence[Order]) -> list[str]:
    llm = llamita.load(directory, backend="torch", device="cpu", dtype="float32")
    params = SamplingParams(max_tokens=LONGEST_ANSWER, temperature=0.0)
    return [generation.text for generation in llm.generate(_prompts(llm, orders), params)]


def in_transformers(directory: Path, orders: Sequence[Order]) -> list[str]:
    import torch
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def answer(tokens: list[int]) -> list[int]:
        ids = torch.tensor([tokens])
        rules = {"do_sample": False, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
        with torch.inference_mode():
            said = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST_ANSWER, repetition_penalty=1.0, **rules
            )
        return [token for token in said[0, len(tokens) :].tolist() if token != tokenizer.eos_token_id]

    return _answered(tokenizer, orders, answer)


def in_llama_cpp(directory: Path, file: Path, orders: Sequence[Order]) -> list[str]:
    import llama_cpp
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    model = llama_cpp.Llama(str(file), n_ctx=512, verbose=False)

    def answer(tokens: list[int]) -> list[int]:
        said: list[int] = []
        for token in model.generate(tokens, temp=0.0, top_k=1, repeat_penalty=1.0):
            if token == tokenizer.eos_token_id or len(said) == LONGEST_ANSWER:
                break
            said.append(token)
        return said

    return _answered(tokenizer, orders, answer)


def _answered(tokenizer: Any, orders: Sequence[Order], answer: Callable[[list[int]], list[int]]) -> list[str]:
    answers = []
    for order in orders:
        laid_out = tokenizer.apply_chat_template(asked(order), add_generation_prompt=True, return_dict=True)
        answers.append(tokenizer.decode(answer(laid_out["input_ids"]), skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    main()
