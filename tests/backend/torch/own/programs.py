"""The solutions of the course's tracks as programs, and programs with a line of theirs changed."""

from collections.abc import Sequence

import numpy as np

from llamita.backend.torch.own.backend import OwnBackend
from llamita.backend.torch.own.runner import OwnRunner
from llamita.learn import track
from llamita.learn.own_model import TRACKS, ReadersProgram
from llamita.model.config import ModelConfig
from tests import reference
from tests.backend import models


def solved(*changes: tuple[str, str, str], of: str = "min-llama", without: Sequence[str] = ()) -> ReadersProgram:
    """The solutions of a track, each of `changes` being a file and a text in it, which occurs once, with what stands
    there; modules that are `without` are not written."""
    uses, found = TRACKS[of], track.find(of)
    sources = dict(track.solutions_of(found.directory, uses.framework))
    for file, old, new in changes:
        path, text = sources[file]
        assert text.count(old) == 1, old
        sources[file] = (path, text.replace(old, new))
    names = tuple(name for name in (*uses.modules, *uses.further) if name not in without)
    return ReadersProgram(found.directory / uses.framework, of, names, sources)


def held_to_the_oracle(backend: OwnBackend, config: ModelConfig) -> tuple[OwnRunner, np.ndarray, dict[str, np.ndarray]]:
    """A runner whose streams and logits over two texts are those of the oracle in numpy; the texts, and what it
    found."""
    arrays = models.perturbed(config)
    tokens = models.random_tokens(config, 2, 17)
    places = ("embedding", "layers.0", "layers.1", "norm")
    runner = backend.runner_over(config, arrays)
    found = runner.forward(tokens, places)
    for row, ids in enumerate(tokens):
        expected = reference.forward(config, {name: array.to_numpy() for name, array in arrays.items()}, ids)
        for place in (*places, "logits"):
            np.testing.assert_allclose(found[place][row], expected[place], atol=2e-5, rtol=1e-4, err_msg=place)
    return runner, tokens, found
