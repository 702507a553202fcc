"""Many prompts through one face: lists, several continuations, threads and asyncio, on a small model read from disk.

What several requests at once give is held to what each gives alone. Tests of `n` above 1 and of requests stepped
together need an engine that serves them so.
"""

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import rich.console

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.inference.llm import LLM
from llamita.text.tokenizer import Tokenizer
from tests.inference.helpers import Opens

PROMPTS = ["The fox", "by the river", "Où est", "a red kite", "and then they sat"]


def drawn(seed: int, max_tokens: int = 24, **more: object) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True, **more)


@pytest.fixture
def alone(tiny_model: Path, runner: TorchRunner) -> list[str]:
    """What each prompt gives by itself, from a model that did nothing else."""
    llm = LLM.load(tiny_model, backend=Opens(runner))
    return [llm.generate(prompt, drawn(seed)).text for seed, prompt in enumerate(PROMPTS)]


def test_a_list_gives_a_list_in_its_order_each_as_alone(llm: LLM, alone: list[str]) -> None:
    params = [drawn(seed) for seed in range(len(PROMPTS))]
    assert [one.text for one in llm.generate(PROMPTS, params)] == alone
    ids = [llm.encode(prompt) for prompt in PROMPTS]
    assert [one.text for one in llm.generate(ids, params)] == alone
    assert [one.text for one in llm.generate([np.array(row) for row in ids], params)] == alone
    assert not llm.engine.has_work


@pytest.mark.parametrize("prompts", [[], ()])
def test_no_prompts_give_no_texts(llm: LLM, prompts: list[str]) -> None:
    assert llm.generate(prompts) == []


def test_one_prompt_in_a_list_gives_a_list_of_one(llm: LLM, alone: list[str]) -> None:
    assert [one.text for one in llm.generate(PROMPTS[:1], drawn(0))] == alone[:1]
    assert llm.generate(PROMPTS[0], [drawn(0)]).text == alone[0]


def test_more_prompts_than_are_handed_over_at_once(llm: LLM, alone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamita.inference.service.WINDOW", 2)
    params = [drawn(seed) for seed in range(len(PROMPTS))]
    assert [one.text for one in llm.generate(PROMPTS, params)] == alone


def test_a_bad_prompt_is_named_before_any_is_begun(llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompt 1: the prompt has 200 tokens"):
        llm.generate(["The fox", [5] * 200])
    with pytest.raises(ValueError, match="2 prompts came with 3 sampling parameters"):
        llm.generate(["a", "b"], [drawn(0)] * 3)
    assert not llm.engine.has_work


def test_a_bar_is_drawn_on_a_terminal_alone(
    llm: LLM, alone: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.generate(PROMPTS, drawn(0), progress=True)
    assert capsys.readouterr() == ("", "")
    terminal = rich.console.Console(stderr=True, force_terminal=True, width=100)
    monkeypatch.setattr("llamita.progress.Console", lambda stderr: terminal)
    texts = llm.generate(PROMPTS, [drawn(seed) for seed in range(len(PROMPTS))], progress=True)
    assert [one.text for one in texts] == alone
    out, err = capsys.readouterr()
    assert out == ""
    assert "5/5" in err
    assert "tokens/s" in err


class Failing:
    """A runner that fails at its n-th step from now."""

    def __init__(self, runner: TorchRunner, step: int) -> None:
        self._runner, self._left = runner, step

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def run(self, *plan: object) -> object:
        self._left -= 1
        if self._left == 0:
            raise MemoryError("no room for keys")
        return self._runner.run(*plan)


def test_a_step_that_fails_is_an_error_of_its_prompt_and_the_next_works(
    runner: TorchRunner, tokenizer: Tokenizer, alone: list[str]
) -> None:
    for call in (
        lambda llm: llm.generate(PROMPTS[0], drawn(0)),
        lambda llm: list(llm.stream(PROMPTS[0], drawn(0))),
        lambda llm: asyncio.run(llm.generate_async(PROMPTS[0], drawn(0))),
        lambda llm: llm.generate(PROMPTS, drawn(0)),
    ):
        llm = LLM(Failing(runner, 5), tokenizer)
        with pytest.raises(RuntimeError, match="no room for keys"):
            call(llm)
        assert not llm.engine.has_work
        assert llm.generate(PROMPTS[0], drawn(0)).text == alone[0]


# --- several continuations -----------------------------------------------------------------------------------------


def test_n_gives_continuations_each_as_its_own_seed_gives(llm: LLM) -> None:
    whole = llm.generate("The fox", drawn(7, n=3))
    assert [one.index for one in whole.continuations] == [0, 1, 2]
    assert whole.text == whole.continuations[0].text
    for index, one in enumerate(whole.continuations):
        single = llm.generate("The fox", drawn(7 + index))
        assert (one.text, one.token_ids, one.finish_reason) == (single.text, single.token_ids, "length")
    events = list(llm.events("The fox", drawn(7, n=3)))
    for index, one in enumerate(whole.continuations):
        assert "".join(event.text for event in events if event.index == index) == one.text
    with pytest.raises(ValueError, match="n=3 texts cannot be one stream"):
        llm.stream("The fox", drawn(7, n=3))


def test_log_probabilities_come_with_it(llm: LLM) -> None:
    asked = SamplingParams(temperature=0, max_tokens=5, top_logprobs=3, prompt_logprobs=True, ignore_eos=True)
    one = llm.generate("The fox", asked)
    assert [row[0] for row in one.top_logprobs] == list(zip(one.token_ids, one.logprobs, strict=True))
    assert all(len(row) == 3 for row in one.top_logprobs)
    prompt = llm.encode("The fox")
    logits = llm.runner.forward([[*prompt, *one.token_ids]])["logits"][0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [logprobs[position, token] for position, token in enumerate(prompt[1:])]
    np.testing.assert_allclose(one.prompt_logprobs, expected, atol=1e-4)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_threads_share_one_engine(llm: LLM, alone: list[str]) -> None:
    texts: dict[int, list[str]] = {}

    def use(index: int) -> None:
        texts[index] = [llm.generate(PROMPTS[index], drawn(index)).text for _ in range(3)]

    threads = [threading.Thread(target=use, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == {index: [text] * 3 for index, text in enumerate(alone)}
    assert not llm.engine.has_work


# --- asyncio ---------------------------------------------------------------------------------------------------------


def test_tasks_are_served_while_the_loop_runs_on(llm: LLM, alone: list[str]) -> None:
    async def main() -> tuple[list[str], float]:
        longest = 0.0

        async def tick() -> None:
            nonlocal longest
            while True:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - before)

        ticking = asyncio.create_task(tick())
        tasks = [llm.generate_async(prompt, drawn(seed)) for seed, prompt in enumerate(PROMPTS)]
        streamed = "".join([event.text async for event in llm.stream_async(PROMPTS[0], drawn(0))])
        texts = [one.text for one in await asyncio.gather(*tasks)]
        many = await llm.generate_async(PROMPTS, [drawn(seed) for seed in range(len(PROMPTS))])
        ticking.cancel()
        assert streamed == texts[0]
        assert [one.text for one in many] == texts
        return texts, longest

    texts, longest = asyncio.run(main())
    assert texts == alone
    assert longest < 2  # a run of steps on the loop itself would be no tick at all until its end
    assert not llm.engine.has_work


def test_the_steps_for_asyncio_run_in_one_thread_that_ends_when_idle(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamita.inference.service.IDLE_SECONDS", 0.05)
    ran: set[int] = set()
    step = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", lambda: (ran.add(threading.get_ident()), step())[1])
    asyncio.run(llm.generate_async(PROMPTS, drawn(3)))
    assert len(ran) == 1
    assert threading.get_ident() not in ran
    deadline = time.monotonic() + 10
    while any(thread.ident in ran for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert llm.generate("The fox", drawn(0, 3)).token_ids


@pytest.mark.parametrize("how", ["cancel", "break", "close"])
def test_leaving_ends_the_request_and_no_other(llm: LLM, alone: list[str], how: str) -> None:
    async def main() -> str:
        neighbour = asyncio.create_task(llm.generate_async(PROMPTS[1], drawn(1)))
        stream = llm.stream_async(PROMPTS[0], drawn(0, 80))
        if how == "cancel":
            task = asyncio.create_task(llm.generate_async(PROMPTS[0], drawn(0, 80)))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "close":
            await anext(stream)
            await stream.aclose()
        else:
            async for _ in stream:
                break
            await stream.aclose()
        text = (await neighbour).text
        deadline = time.monotonic() + 10
        while llm.engine.has_work:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        return text

    assert asyncio.run(main()) == alone[1]
    assert llm.generate(PROMPTS[0], drawn(0)).text == alone[0]


def test_a_reader_that_falls_behind_is_given_up(llm: LLM) -> None:
    read = []

    async def main() -> None:
        async for event in llm.stream_async("The fox", drawn(0, 80), buffer=4):
            read.append(event)
            await asyncio.sleep(0.2)

    with pytest.raises(RuntimeError, match="fell more than 4 tokens behind"):
        asyncio.run(main())
    assert len(read) < 20
    assert not llm.engine.has_work


def test_what_cannot_be_served_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="has 200 tokens"):
        asyncio.run(llm.generate_async([5] * 200))
    with pytest.raises(ValueError, match="prompt 1: the prompt has 200 tokens"):
        asyncio.run(llm.generate_async(["a", [5] * 200]))


def test_closing_ends_what_is_open_and_refuses_more(llm: LLM) -> None:
    async def main() -> None:
        stream = llm.stream_async("The fox", drawn(0, 80))
        await anext(stream)
        await asyncio.to_thread(llm.close)
        with pytest.raises(RuntimeError, match="closed while it wrote"):
            async for _ in stream:
                pass

    asyncio.run(main())
    assert not llm.engine.has_work
    with pytest.raises(RuntimeError, match="this model was closed"):
        llm.generate("The fox", drawn(0))
