"""Recorded steps: on a CPU recorded as what computes them anew, by Triton's interpreter; on a GPU as CUDA graphs."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from llamita.backend.interface import CacheLayout, Plan, SampleSpec, ScheduledChunk, Target
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer import runner
from llamita.backend.torch.infer.graphs import DecodeGraphs, sizes_up_to
from llamita.backend.torch.infer.kernels.table_attention import attention_over_tables
from llamita.backend.torch.infer.kv_cache import PagedKVCache
from llamita.backend.torch.infer.runner import TorchMemory, TorchRunner
from llamita.backend.torch.infer.sampling import Sampler
from llamita.backend.torch.model.weights import build_model
from llamita.inference.config import EngineConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.model.config import ModelConfig
from tests.backend.paged import shuffled_tables
from tests.inference.test_adapters import SETTINGS, adapter_of

PLAIN = ModelConfig(60, 16, 24, 2, 4, 2, 64, eos_token_id=None)
WINDOWED = ModelConfig(
    60, 16, 24, 3, 4, 2, 64, eos_token_id=None, sliding_window=9, full_attention_layers=2, query_key_value_bias=True
)
NARROW = ModelConfig(60, 16, 24, 2, 4, 2, 64, eos_token_id=None, sliding_window=9)
GREEDY = SamplingParams(temperature=0, max_tokens=10)


def again(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Recording for a CPU, which has no graphs."""
    return compute


class RecordingRunner(TorchRunner):
    """A runner that decodes as on a GPU: through tables, by recorded steps."""

    def allocate(self, layout: CacheLayout, sequences: int = 0) -> TorchMemory:
        cache = PagedKVCache(self.config, layout, self.dtype, self.device, attention_over_tables)
        with torch.inference_mode():
            graphs = DecodeGraphs(self._decode, cache, sequences, again)
        self.used: list[int] = []
        replay = graphs.run

        def run(chunks: list[ScheduledChunk]) -> Tensor:
            self.used.append(len(chunks))
            return replay(chunks)

        graphs.run = run  # type: ignore[method-assign]
        return TorchMemory(cache, Sampler(self.config.vocab_size, self.device), graphs)


def texts(engine: Engine, tokens: int = 10) -> dict[tuple[int, int], list[int | None]]:
    """What requests of several lengths and kinds get, by request and continuation: so many tokens, or two more."""
    random = np.random.default_rng(2)
    for number, length in enumerate((1, 30, 17, 9)):
        params = SamplingParams(temperature=0, max_tokens=tokens)
        if number == 2:
            params = SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=tokens + 2)
        engine.add(Request(number, tuple(random.integers(60, size=length).tolist()), params))
    found: dict[tuple[int, int], list[int | None]] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault((event.request_id, event.index), []).append(event.token_id)
    return found


@pytest.mark.medium
@pytest.mark.parametrize(
    ("config", "blocks", "tokens"),
    [(PLAIN, 60, 6), (WINDOWED, 14, 10), (NARROW, 9, 6)],
    ids=["plain", "windowed, preempting", "less memory than positions"],
)
def test_an_engine_over_recorded_steps_says_the_same(config: ModelConfig, blocks: int, tokens: int) -> None:
    limits = EngineConfig(max_sequences=4, block_size=4, blocks=blocks, prefill_tokens=16)
    model = build_model(config, seed=1)
    recording = RecordingRunner(model)
    engine = Engine(recording, config=limits)
    found = texts(engine, tokens)
    assert found == texts(Engine(TorchRunner(model), config=limits), tokens)
    assert sum(map(len, found.values())) == 3 * tokens + 2 * (tokens + 2)
    assert (engine.scheduler.preemptions > 0) == (config is WINDOWED)
    assert len(set(recording.used)) > 2


def test_a_recorded_step_touches_no_other_sequence() -> None:
    """Rows that are left over from a fuller step write into the spare block alone."""
    recording = RecordingRunner(build_model(PLAIN, seed=1))
    layout = CacheLayout(4, 12)
    memory, tables = recording.allocate(layout, 4), shuffled_tables(layout, [16] * 3)

    def decode(position: int, sequences: range) -> None:
        chunks = [
            ScheduledChunk(i, (7 + i,), position, tables[i], (SampleSpec(GREEDY, 0, position + 1),)) for i in sequences
        ]
        recording.run(Plan(tuple(chunks)), memory)

    decode(0, range(3))
    before = [x.clone() for x in (*memory.cache.keys, *memory.cache.values)]
    decode(1, range(1))
    slot = int(tables[0][0][0]) * 4 + 1
    for old, new in zip(before, (*memory.cache.keys, *memory.cache.values), strict=True):
        changed = (old != new).any(-1).any(-1).nonzero()[:, 0].tolist()
        assert slot in changed
        assert set(changed) - {slot} <= {memory.cache.spare_block * 4}
    assert recording.used == [3, 1]


def test_a_chunk_a_crowd_or_an_adapter_is_no_recorded_step() -> None:
    graphs = RecordingRunner(build_model(PLAIN, seed=1)).allocate(CacheLayout(4, 12), 3).graphs
    assert graphs is not None
    table = (np.arange(3, dtype=np.int32),)
    assert graphs.sizes == [1, 2, 4]
    assert graphs.fit([ScheduledChunk(i, (1,), 3, table) for i in range(4)])
    assert not graphs.fit([ScheduledChunk(i, (1,), 3, table) for i in range(5)])
    assert not graphs.fit([ScheduledChunk(0, (1, 2), 3, table)])


def test_the_default_adapter_decodes_by_recorded_steps_and_another_does_not() -> None:
    """Recorded with that of the model itself, as an adapter directory opens; a chunk that names another is computed."""
    config = dataclasses.replace(PLAIN, tie_word_embeddings=False)
    model, layout = build_model(config, seed=1), CacheLayout(4, 12)
    adapters = {name: adapter_of(config, SETTINGS[name], seed) for seed, name in enumerate("ab")}
    recording = RecordingRunner(model, adapters=adapters, default="a")
    plain = TorchRunner(model, adapters=adapters, default="a")
    tables = shuffled_tables(layout, [16] * 2)
    memories = [one.allocate(layout, 2) for one in (recording, plain)]
    for position, names in enumerate(((None, None), ("a", None), (None, "b"))):
        chunks = tuple(
            ScheduledChunk(
                i, (7 + i,), position, tables[i], (SampleSpec(GREEDY, 0, position + 1),), (Target(0, 3),), name
            )
            for i, name in enumerate(names)
        )
        ours, theirs = (one.run(Plan(chunks), memory) for one, memory in zip((recording, plain), memories, strict=True))
        np.testing.assert_allclose(ours.target_logprobs, theirs.target_logprobs, atol=1e-5)
    assert recording.used == [2, 2]


def test_a_replay_that_gives_something_else_is_refused() -> None:
    recording = RecordingRunner(build_model(PLAIN, seed=1))
    cache = PagedKVCache(PLAIN, CacheLayout(4, 12), kernel=attention_over_tables)

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: compute() * 1.01

    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"a replayed step is .* from the step itself"):
        DecodeGraphs(recording._decode, cache, 1, record)


def test_where_recording_fails_decoding_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose driver refuses: here there is none to record on."""
    monkeypatch.setattr(runner, "table_kernel", lambda device: attention_over_tables)
    monkeypatch.setattr(runner, "cuda_recorder", lambda device: _refuse)
    with pytest.warns(UserWarning, match="decoding goes on without CUDA graphs: no such thing"):
        memory = TorchRunner(build_model(PLAIN, seed=1)).allocate(CacheLayout(4, 12), 3)
    assert memory.graphs is None
    assert memory.cache.kernel is None


def _refuse(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    raise RuntimeError("no such thing\nat all")


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (9, [1, 2, 4, 8, 16]), (40, [1, 2, 4, 8, 16, 32, 48])]
)
def test_the_sizes_that_are_recorded(most: int, sizes: list[int]) -> None:
    assert sizes_up_to(most) == sizes


@pytest.mark.gpu
@pytest.mark.parametrize("config", [PLAIN, WINDOWED], ids=["plain", "windowed"])
def test_cuda_graphs_say_what_the_cpu_says(config: ModelConfig) -> None:
    limits = EngineConfig(max_sequences=4, block_size=4, blocks=60, prefill_tokens=16)
    expected = texts(Engine(TorchRunner(build_model(config, seed=1)), config=limits))
    engine = Engine(TorchRunner(build_model(config, seed=1, device="cuda")), config=limits)
    assert engine._memory.graphs is not None
    assert texts(engine) == expected
