"""Trains a small Llama on Meadow's stories with what you have written, in a minute or a few, and has it write one.

    python train.py [--steps 300] [--stories 3000] [--seed 0]

It needs the lessons up to packing, and writes trained.npz and merges.json for tune.py and classify.py.
"""

import argparse
import time

import numpy as np
from adamw import AdamW
from batches import Batch, batch_of, drawn, encoder, save, text_of, written
from bpe import train
from config import END, LEARNED, PADDING, START, Sizes
from framework import computed, integers, without_gradients
from llama import initialized, logits_of
from loop import Settings, train_step
from loss import shifted, summed_cross_entropy
from packing import packed, packed_labels

from llamita.data import meadow

LENGTH, ROWS, PARTS = 128, 8, 2
"""Positions of a row, rows of a part, parts of a batch: the gradients of the parts are added up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stories", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes, began = Sizes(), time.monotonic()

    stories = list(meadow.corpus(options.seed, options.stories, "train"))
    merges = train(stories[:500], LEARNED)
    encode = encoder(merges)
    documents = [[START, *encode(story), END] for story in stories]
    tokens = sum(len(document) for document in documents)
    print(f"{len(stories)} stories, {tokens} tokens of {sum(map(len, stories)) / tokens:.2f} characters")
    rows, numbers = (np.array(each) for each in packed(documents, LENGTH, PADDING))

    def summed_loss(parameters, batch: Batch):
        return summed_cross_entropy(
            logits_of(parameters, sizes, batch.tokens, batch.positions, batch.mask), batch.labels
        )

    parameters, optimizer = initialized(sizes, options.seed), AdamW()
    settings = Settings(options.steps, peak=1.2e-2, minimum=6e-4, warmup_steps=min(20, options.steps - 1))
    order = drawn(len(rows), ROWS, options.seed)
    for step in range(options.steps):
        batches = []
        for _ in range(PARTS):
            chosen = next(order)
            here, whose = integers(rows[chosen]), integers(numbers[chosen])
            batches.append(batch_of(here[:, :-1], packed_labels(here, whose), whose[:, :-1]))
        parameters, loss, norm = train_step(summed_loss, parameters, optimizer, batches, step, settings)
        computed(parameters, loss)
        if step % 50 == 0 or step == options.steps - 1:
            seconds = time.monotonic() - began
            print(f"step {step:4d}  loss {float(loss):.3f}  norm {float(norm):.2f}  {seconds:.0f} s", flush=True)

    held_out = list(meadow.corpus(options.seed, 64, "validation"))
    nats = 0.0
    for first in range(0, len(held_out), ROWS):
        texts = [[START, *encode(story), END] for story in held_out[first : first + ROWS]]
        width = max(map(len, texts))
        whole = integers([text + [PADDING] * (width - len(text)) for text in texts])
        inputs, labels = shifted(whole, PADDING)
        # Padding stands behind, so each text is the first document of its row, whatever follows.
        batch = batch_of(inputs, labels, 0 * inputs + 1)
        nats += float(without_gradients(lambda batch=batch: summed_loss(parameters, batch)))
    floor = meadow.floor(held_out)
    print(f"held out: {nats / floor.characters:.4f} nats a character; no model can have less than", end=" ")
    print(f"{floor.nats_per_character:.4f}")
    story = written(parameters, sizes, [START], LENGTH, temperature=0.8, seed=options.seed)
    print(f"a story: {text_of(story, merges)}")
    save(parameters, merges)


if __name__ == "__main__":
    main()
