"""Trains a classifier over the model of train.py, and makes it as sure as it is right.

    python classify.py [--stories 300] [--steps 150] [--seed 0]

Will a story end happily? Its last two sentences, which say so, are left out; of every second story the last three, and
then nobody can know. It needs trained.npz and merges.json, and the lessons on AdamW, the schedule, clipping and packing
and the last two; less than a minute.
"""

import argparse
import time

import numpy as np
from adamw import AdamW
from batches import Batch, batch_of_texts, drawn, encoder, load
from calibration import expected_calibration_error, fitted_temperature
from classifier import class_log_probs, classification_loss
from clipping import clipped
from config import PADDING, START, Sizes
from framework import computed, floats, integers, value_and_gradients, without_gradients
from llama import hidden_states
from schedule import learning_rate

from llamita.data import meadow_tasks

CLASSES = ("sad", "happy")
ROWS, HELD_OUT, BINS = 16, 400, 10
HIDDEN = (2, 3)
"""So many sentences at the end of a story are not shown, in turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, merges = load()
    encode = encoder(merges)
    sizes, began = Sizes(), time.monotonic()

    def examples(split: str, count: int) -> list[tuple[list[int], int]]:
        found = []
        for number, record in enumerate(meadow_tasks.labels(options.seed, count, split)):
            beginning = record["text"].rsplit(". ", HIDDEN[number % 2])[0] + "."
            found.append(([START, *encode(beginning)], CLASSES.index(record["label"])))
        return found

    def log_probs(parameters, batch: Batch):
        hidden = hidden_states(parameters, sizes, batch.tokens, batch.positions, batch.mask)
        return class_log_probs(hidden, batch.tokens != PADDING, parameters["weight"], parameters["bias"])

    def scores(texts: list[tuple[list[int], int]]) -> np.ndarray:
        parts = []
        for first in range(0, len(texts), 2 * ROWS):
            batch = batch_of_texts([(tokens, tokens) for tokens, _ in texts[first : first + 2 * ROWS]])
            parts.append(without_gradients(lambda batch=batch: log_probs(parameters, batch)))
        return np.concatenate(parts).astype(np.float64)

    train, held_out = examples("train", options.stories), examples("validation", HELD_OUT)
    head = np.random.default_rng(options.seed).normal(size=(len(CLASSES), sizes.width)) * 0.02
    parameters = {**model, "weight": floats(head), "bias": floats(np.zeros(len(CLASSES)))}
    optimizer, order = AdamW(weight_decay=0.01), drawn(len(train), ROWS, options.seed)
    for step in range(options.steps):
        chosen = [train[number] for number in next(order)]
        batch, labels = batch_of_texts([(tokens, tokens) for tokens, _ in chosen]), integers([y for _, y in chosen])

        def loss_of(parameters, batch=batch, labels=labels):
            return classification_loss(log_probs(parameters, batch), labels)

        loss, gradients = value_and_gradients(loss_of, parameters)
        gradients, _ = clipped(gradients, 1.0)
        rate = learning_rate(step, 2e-3, 2e-4, min(10, options.steps - 1), options.steps)
        parameters = optimizer.update(parameters, gradients, rate)
        computed(parameters, loss)
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {float(loss):.3f}  {time.monotonic() - began:.0f} s", flush=True)

    found, labels = scores(held_out), np.array([label for _, label in held_out])
    fit, rest = slice(0, HELD_OUT // 2), slice(HELD_OUT // 2, None)
    temperature = fitted_temperature(found[fit], labels[fit])
    right = (found[rest].argmax(axis=1) == labels[rest]).mean()
    print(f"held out: {right:.1%} of {HELD_OUT // 2} texts right; the temperature of the others is {temperature:.2f}")
    for name, scale in (("as it is", 1.0), ("at that temperature", temperature)):
        weights = np.exp(found[rest] / scale)
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        error = expected_calibration_error(probabilities, labels[rest], BINS)
        print(f"{name}: mean confidence {probabilities.max(axis=1).mean():.1%}, calibration error {error:.3f}")


if __name__ == "__main__":
    main()
