"""Teaches the model of train.py to answer questions about a story by adapters, then to prefer right answers.

    python tune.py [--steps 200] [--preference-steps 200] [--rank 8] [--seed 0]

It needs trained.npz and merges.json, and lessons 1 to 11 (up to dpo); about as long as train.py.
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from adamw import AdamW
from batches import Batch, batch_of_texts, drawn, encoder, load, text_of, written
from clipping import clipped
from config import ASSISTANT, END, USER, Sizes
from dpo import answer_log_probs, dpo_loss
from framework import computed, floats, to_numpy, value_and_gradients, without_gradients
from instructions import inputs_and_labels
from llama import LINEAR_MAPS, logits_of, shapes
from loop import Settings, train_step
from lora import fresh_factors, merged_weight
from loss import IGNORE_INDEX, summed_cross_entropy
from schedule import learning_rate

from llamita.data import meadow_tasks

MARKERS = {"user": USER, "assistant": ASSISTANT}
ROWS, PAIRS, BETA = 16, 16, 2.0
STORIES, HELD_OUT = 2000, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--preference-steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, merges = load()
    encode = encoder(merges)
    sizes, began = replace(Sizes(), alpha=2.0 * options.rank), time.monotonic()

    def logits(parameters, batch: Batch):
        return logits_of(parameters, sizes, batch.tokens, batch.positions, batch.mask)

    def row_of(question: str, answer: str) -> tuple[list[int], list[int]]:
        turns = [("user", encode(question)), ("assistant", encode(answer))]
        return inputs_and_labels(turns, MARKERS, END)

    def held_out_loss(parameters) -> float:
        batch = batch_of_texts([row_of(question, answer) for question, answer, _ in held_out])
        total = without_gradients(lambda: summed_cross_entropy(logits(parameters, batch), batch.labels))
        return float(total) / int((to_numpy(batch.labels) != IGNORE_INDEX).sum())

    def answer_to(parameters, question: str) -> str:
        start = [USER, *encode(question), END, ASSISTANT]
        return text_of(written(parameters, sizes, start, 16, temperature=0.0, seed=0), merges)

    train, held_out = pairs("train", options.seed, STORIES), pairs("validation", options.seed, HELD_OUT)
    rows = [row_of(question, answer) for question, answer, _ in train]
    adapter, optimizer = fresh_adapter(sizes, options.rank, options.seed), AdamW(weight_decay=0.0)
    learned, whole = sum(to_numpy(array).size for array in adapter.values()), sum(map(np.prod, shapes(sizes).values()))
    print(f"adapters of rank {options.rank}: {learned} numbers to learn beside {whole}")
    print(f"answers held out: {held_out_loss({**model, **adapter}):.3f} nats a token")

    def summed_loss(parameters, batch: Batch):
        return summed_cross_entropy(logits({**model, **parameters}, batch), batch.labels)

    settings = Settings(options.steps, peak=1e-2, minimum=1e-3, warmup_steps=min(10, options.steps - 1))
    order = drawn(len(rows), ROWS, options.seed)
    for step in range(options.steps):
        batch = batch_of_texts([rows[number] for number in next(order)])
        adapter, loss, _ = train_step(summed_loss, adapter, optimizer, [batch], step, settings)
        computed(adapter, loss)
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {float(loss):.3f}  {time.monotonic() - began:.0f} s", flush=True)
    print(f"answers held out: {held_out_loss({**model, **adapter}):.3f} nats a token")
    model = merged(model, adapter, sizes)
    print(f"merged, the same: {held_out_loss(model):.3f} nats a token")
    show(held_out[:3], lambda question: answer_to(model, question))

    def answers(parameters, texts: Sequence[tuple[str, str, str]], which: int):
        batch = batch_of_texts([row_of(text[0], text[which]) for text in texts])
        return answer_log_probs(logits(parameters, batch), batch.labels)

    def share_preferred(parameters) -> float:
        better, worse = (
            without_gradients(lambda which=which: answers(parameters, held_out, which)) for which in (1, 2)
        )
        return float((better > worse).mean())

    print(f"right answers more likely than wrong ones: {share_preferred(model):.0%} of those held out")
    adapter, optimizer = fresh_adapter(sizes, options.rank, options.seed + 1), AdamW(weight_decay=0.0)
    order, steps = drawn(len(train), PAIRS, options.seed + 1), options.preference_steps
    for step in range(steps):
        texts = [train[number] for number in next(order)]
        before = [
            floats(without_gradients(lambda which=which, texts=texts: answers(model, texts, which))) for which in (1, 2)
        ]

        def loss_of(parameters, texts=texts, before=before):
            both = [answers({**model, **parameters}, texts, which) for which in (1, 2)]
            return dpo_loss(*both, *before, BETA)

        loss, gradients = value_and_gradients(loss_of, adapter)
        gradients, _ = clipped(gradients, 1.0)
        adapter = optimizer.update(adapter, gradients, learning_rate(step, 1e-3, 1e-4, min(5, steps - 1), steps))
        computed(adapter, loss)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {float(loss):.3f}  {time.monotonic() - began:.0f} s", flush=True)
    model = merged(model, adapter, sizes)
    print(f"right answers more likely than wrong ones: {share_preferred(model):.0%} of those held out")
    show(held_out[:3], lambda question: answer_to(model, question))


def pairs(split: str, seed: int, count: int) -> list[tuple[str, str, str]]:
    """Returns questions about Meadow's stories, each with the right answer and a wrong one."""
    found: Iterable = islice(meadow_tasks.preferences(seed, count, split), count)
    return [(each["prompt"], each["chosen"], each["rejected"]) for each in found]


def fresh_adapter(sizes: Sizes, rank: int, seed: int) -> dict:
    """Returns A and B of every linear map of the model, by name."""
    random = np.random.default_rng(seed)
    adapter = {}
    for name, shape in shapes(sizes).items():
        if name.endswith(LINEAR_MAPS):
            uniform = floats(random.random((rank, shape[1])))
            adapter[f"{name}.a"], adapter[f"{name}.b"] = fresh_factors(uniform, shape[0])
    return adapter


def merged(model: dict, adapter: dict, sizes: Sizes) -> dict:
    """Returns the model with its adapter added to its weights."""
    maps = {name.removesuffix(".a") for name in adapter if name.endswith(".a")}
    return {
        name: merged_weight(weight, adapter[f"{name}.a"], adapter[f"{name}.b"], sizes.alpha) if name in maps else weight
        for name, weight in model.items()
    }


def show(texts: Sequence[tuple[str, str, str]], answer_to) -> None:
    """Prints questions, the right answers, and the model's."""
    for question, answer, _ in texts:
        print(f"  {question.splitlines()[-1]} Right: {answer} The model: {answer_to(question)}")


if __name__ == "__main__":
    main()
