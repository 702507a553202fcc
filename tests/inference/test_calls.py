"""Work that is done between an engine's steps: its results and errors, its turn beside requests, its cancelling."""

import asyncio
import threading

import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.llm import LLM
from tests.inference.hash_model import HashRunner


def test_a_call_gives_its_result_or_its_error(llm: LLM) -> None:
    async def ask() -> None:
        assert await llm.service.call_async(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await llm.service.call_async(lambda: 1 // 0)
        assert await llm.service.call_async(lambda: "still there") == "still there"

    asyncio.run(ask())
    llm.close()


def test_calls_run_beside_requests_and_change_none_of_them(llm: LLM) -> None:
    params = SamplingParams(seed=5, max_tokens=40, ignore_eos=True)
    alone = llm.generate("The fox", params).text
    steps: list[bool] = []

    async def ask() -> list[object]:
        async def call(number: int) -> int:
            return await llm.service.call_async(lambda: steps.append(llm.service.seconds_in_step > 0) or number)

        return await asyncio.gather(llm.generate_async("The fox", params), *map(call, range(20)))

    generation, *numbers = asyncio.run(ask())
    assert (generation.text, numbers) == (alone, list(range(20)))
    assert steps == [True] * 20, "each has had its turn in a step"
    assert llm.service.seconds_in_step == 0
    llm.close()


def test_a_call_whose_caller_has_gone_is_never_begun() -> None:
    llm = LLM(HashRunner())
    begun, free, ran = threading.Event(), threading.Event(), []

    def hold() -> None:
        begun.set()
        assert free.wait(30)

    async def ask() -> None:
        holding = asyncio.create_task(llm.service.call_async(hold))
        await asyncio.to_thread(begun.wait, 30)
        waiting = asyncio.create_task(llm.service.call_async(lambda: ran.append(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        free.set()
        await holding
        await llm.service.call_async(lambda: None)

    asyncio.run(ask())
    assert not ran
    llm.close()


def test_a_closed_model_refuses_calls(llm: LLM) -> None:
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(llm.service.call_async(lambda: 1))


def test_events_of_several_requests_come_with_the_places_of_their_requests(llm: LLM) -> None:
    prompts = ["The fox", "by the river", "a red kite"]
    params = [SamplingParams(seed=seed, max_tokens=9, n=2, ignore_eos=True) for seed in range(3)]
    expected = [[one.text for one in found.continuations] for found in llm.generate(prompts, params)]
    requests = [llm.request(prompt, chosen) for prompt, chosen in zip(prompts, params, strict=True)]
    texts = [["", ""] for _ in prompts]

    async def read() -> None:
        async for batch in llm.service.follow_many_async(requests):
            assert batch
            for place, event in batch:
                texts[place][event.index] += event.text

    asyncio.run(read())
    assert texts == expected
    assert not llm.engine.has_work
    llm.close()
