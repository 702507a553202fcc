"""Trains a small model of which byte follows which on the lessons' own text: embeddings, a linear map, AdamW.

    python train.py

It sees one byte at a time, so the best that it could do is known: the mean of -log(share of the next byte among all
that follow the same byte), counted from the text.
"""

from pathlib import Path

import numpy as np
from functions import embedding, linear
from loss import cross_entropy, cross_entropy_gradient, embedding_gradient, linear_gradients

from optimizer import AdamW

BYTES, WIDTH, BATCH, STEPS = 256, 64, 512, 600


def main() -> None:
    text = "".join(path.read_text("utf-8") for path in sorted(Path("lessons").glob("*.md")))
    data = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    print(f"{len(data)} bytes; the least loss of a model that sees one byte is {least_loss(data):.3f}")
    generator = np.random.default_rng(0)
    parameters = {
        "embedding": generator.normal(0.0, 0.1, (BYTES, WIDTH)).astype(np.float32),
        "output": generator.normal(0.0, 0.1, (BYTES, WIDTH)).astype(np.float32),
    }
    optimizer = AdamW(parameters, lr=0.02, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        places = generator.integers(len(data) - 1, size=BATCH)
        loss, gradients = loss_and_gradients(parameters, data[places], data[places + 1])
        optimizer.step(gradients)
        if step in (1, 10) or step % 100 == 0:
            print(f"step {step:3}: loss {loss:.3f}")
    loss, _ = loss_and_gradients(parameters, data[:-1], data[1:])
    print(f"on the whole text: loss {loss:.3f}")


def loss_and_gradients(
    parameters: dict[str, np.ndarray], tokens: np.ndarray, labels: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the loss and its derivatives by both parameters: forwards through the two functions, then backwards."""
    x = embedding(tokens, parameters["embedding"])
    logits = linear(x, parameters["output"])
    by_logits = cross_entropy_gradient(logits, labels)
    by_x, by_output = linear_gradients(x, parameters["output"], by_logits)
    by_embedding = embedding_gradient(tokens, BYTES, by_x)
    return cross_entropy(logits, labels), {"embedding": by_embedding, "output": by_output}


def least_loss(data: np.ndarray) -> float:
    """Returns the entropy of a byte where the one before it is known, in nats."""
    pairs = np.zeros((BYTES, BYTES))
    np.add.at(pairs, (data[:-1], data[1:]), 1)
    shares = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    return float(-(pairs[pairs > 0] * np.log(shares[pairs > 0])).sum() / pairs.sum())


if __name__ == "__main__":
    main()
