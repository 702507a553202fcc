"""`--with` over trained models: the greedy tokens of the course's code are the library's, by the margin rule."""

from pathlib import Path

import numpy as np
import pytest

from llamita import EngineConfig, SamplingParams
from llamita.backend.choice import load_backend
from llamita.backend.torch.own.backend import OwnBackend
from llamita.backend.torch.pickles import read_pickle, write_pickle
from llamita.inference.llm import LLM
from llamita.learn import course, track
from llamita.workflows.convert import Tools
from tests.backend.torch.own.programs import solved
from tests.real import smollm2

DIFFERENCE = 2e-4
"""Of logits between the two programs, measured in the tests."""


def assert_the_librarys(track: str, model: Path, prompts: list[str], tokens: int, beginning: str) -> None:
    """Texts that are served together in little memory, so that some are put off, and again alone."""
    library = LLM.load(model, backend="torch", device="cpu", dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    asked = [f"{beginning}{prompt}" for prompt in prompts]
    expected = library.generate(asked, params)
    longest = max(len(library.encode(prompt)) for prompt in asked) + tokens
    little = EngineConfig(blocks=2 * -(-longest // 16))
    own = LLM.load(model, backend=OwnBackend(solved(of=track)), engine=little)
    together = own.generate(asked, params)
    assert sum(found.statistics.preemptions for found in together) > 0
    again = own.generate(asked[0], params)
    assert again.statistics.cached_tokens > 0
    for prompt, found, right in zip([*asked, asked[0]], [*together, again], [*expected, expected[0]], strict=True):
        pairs = enumerate(zip(found.token_ids, right.token_ids, strict=True))
        first = next((number for number, (a, b) in pairs if a != b), tokens)
        text = [[*library.encode(prompt), *right.token_ids[:first]]]
        logits, mine = (llm.runner.forward(text, logits="last")["logits"][0, -1] for llm in (library, own))
        assert np.abs(mine - logits).max() < DIFFERENCE
        if first < tokens:
            best, second = np.sort(logits)[[-1, -2]]
            assert best - second <= 2 * DIFFERENCE, f"token {first} after {prompt!r} is another, by {best - second}"


@pytest.mark.medium
def test_smollm2_writes_the_same_by_the_readers_model() -> None:
    beginning = "You answer in one short sentence, and in English.\n"
    assert_the_librarys("serving", smollm2.needed(), smollm2.PROMPTS, 32, beginning)


@pytest.mark.medium
def test_a_model_of_meadow_writes_the_same_by_the_readers_model(tmp_path: Path) -> None:
    tools = Tools(load_backend("torch", device="cpu"), read_pickle, write_pickle)
    course.start(tmp_path / "course", track.find("serving"), "torch", None, 60, tools)
    prompts = ["One day", "Once upon a time", "In the garden", "The fox"]
    for name in ("serving", "numpy"):
        beginning = "It was spring. The sun shone on the meadow. "
        assert_the_librarys(name, tmp_path / "course" / "model", prompts, 30, beginning)
