"""Two runs of one model held to each other, layer by layer: what a person looks at when a port almost works.

The residual stream after the embedding and after each layer, and the logits, of fixed or given token ids. Differences
are relative to the largest magnitude there. Backends are passed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamita.backend.interface import Forward
from llamita.model.config import ModelConfig

TOLERANCE = 1e-4
PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Place:
    """The distance of two runs at one place, as shares of the largest magnitude of the reference there."""

    name: str
    largest: float
    mean: float


@dataclass(frozen=True)
class Verification:
    """A comparison of two runs, in the order of the forward pass; the logits last."""

    places: tuple[Place, ...]
    tolerance: float
    tokens: int
    same_likeliest: int
    """Positions at which both give the same token the largest logit."""
    unclear: int
    """Other positions, at which the two largest logits are closer than twice the difference of the runs."""

    @property
    def first_fault(self) -> Place | None:
        """The first place past the tolerance."""
        return next((place for place in self.places if not place.largest <= self.tolerance), None)

    @property
    def agrees(self) -> bool:
        """Whether all is within the tolerance, and every clear choice of token the same."""
        return self.first_fault is None and self.same_likeliest + self.unclear == self.tokens


def verify(
    model: Forward,
    reference: Forward,
    config: ModelConfig,
    tokens: Sequence[int] | None = None,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Run both on the tokens (or fixed random ones) and compare them; places that the reference lacks are left out."""
    if tokens is None:
        count = min(PROMPT_TOKENS, config.max_position_embeddings)
        tokens = np.random.default_rng(0).integers(config.vocab_size, size=count).tolist()
    if not tokens or not all(0 <= token < config.vocab_size for token in tokens):
        raise ValueError(f"the tokens to verify with must be ids from 0 to {config.vocab_size - 1}, at least one")
    names = ["embedding", *(f"layers.{layer}" for layer in range(config.num_hidden_layers)), "norm"]
    ours = model.forward(np.array([tokens]), names)
    theirs = reference.forward(np.array([tokens]), names)
    places = [_place(name, ours[name], theirs[name]) for name in [*names, "logits"] if name in theirs]
    logits_TV, others_TV = ours["logits"][0], theirs["logits"][0]
    same_T = logits_TV.argmax(-1) == others_TV.argmax(-1)
    best_T2 = np.sort(others_TV, axis=-1)[:, -2:]
    unclear_T = ~same_T & (best_T2[:, 1] - best_T2[:, 0] <= 2 * np.abs(logits_TV - others_TV).max(-1))
    return Verification(tuple(places), tolerance, len(tokens), int(same_T.sum()), int(unclear_T.sum()))


def _place(name: str, ours: np.ndarray, theirs: np.ndarray) -> Place:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{name} has shape {list(ours.shape)} here and {list(theirs.shape)} there; these are two models"
        )
    difference = np.abs(ours.astype(np.float64) - theirs)
    scale = float(np.abs(theirs).max()) or 1.0
    return Place(name, float(difference.max()) / scale, float(difference.mean()) / scale)
