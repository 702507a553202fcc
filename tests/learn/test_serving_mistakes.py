"""The serving track's grader names each planted mistake, however it is written, and gives no other a wrong name."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.learn.graded import graded
from tests.learn.serving import FRAMEWORKS, TRACK

QUICK = {
    "torch": ("softmax", "causal_mask", "scaled_dot_product_attention_grouped", "RMSNorm", "dequantize_weights",
              "merge_block", "paged_attention", "PrefixCache.match", "accept_greedy"),
    "mlx": ("causal_mask", "draw"),
}  # fmt: skip
"""Checks whose mistakes are judged in every run of the tests; the others are medium."""
WHOLE = "Model, with all parts your own"
CHECKS = [check for lesson in TRACK.lessons for check in lesson.checks]
GROUPED, SIMPLE = "scaled_dot_product_attention_grouped", "scaled_dot_product_attention_simple"


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> str:
    graded("serving", request.param)  # skips the test where the framework is not there
    return str(request.param)


def judged(framework: str, directory: Path, check: str, files: dict[str, str]) -> dict[str, Any]:
    """The grader's judgement of a check, where these of the reader's files are other than the solutions."""
    return graded("serving", framework).judged(directory, check, files)


def replaced(framework: str, file: str, *changes: tuple[str, str]) -> dict[str, str]:
    return graded("serving", framework).replaced(file, *changes)


def rewritten(framework: str, file: str, function: str, body: str) -> dict[str, str]:
    """The file with another body in the place of a function's solution."""
    return rewritten_all(framework, file, {function: body})


def rewritten_all(framework: str, file: str, bodies: dict[str, str]) -> dict[str, str]:
    """The file with other bodies in the place of several solutions."""
    text = TRACK.solutions(framework)[file]
    for function, body in bodies.items():
        begin = text.index("# to do:", text.index(f"def {function}("))
        begin, end = text.rindex("\n", 0, begin) + 1, text.index("# done\n", begin)
        text = f"{text[:begin]}{body}\n{text[text.rindex(chr(10), 0, end) + 1 :]}"
    return {file: text}


def test_the_lessons_name_the_checks_that_there_are(framework: str) -> None:
    assert list(graded("serving", framework).grader.checks) == CHECKS


def test_the_solutions_pass_and_the_skeletons_are_not_yet_written(framework: str, tmp_path: Path) -> None:
    for check in CHECKS:
        assert judged(framework, tmp_path, check, {}) == {"state": "passed"}, check
        assert judged(framework, tmp_path, check, TRACK.skeletons(framework)) == {"state": "not written"}, check


def test_there_are_many_mistakes_and_both_frameworks_have_the_same() -> None:
    lists = [
        [(m.check, m.name, m.source) for m in graded("serving", framework).grader.mistakes] for framework in FRAMEWORKS
    ]
    assert lists[0] == lists[1]
    assert len(set(lists[0])) == len(lists[0]) >= 350
    assert {check for check, _, _ in lists[0]} == set(CHECKS) - {WHOLE}


@pytest.mark.parametrize(
    ("framework", "check"),
    [
        pytest.param(framework, check, marks=[] if check in QUICK[framework] else pytest.mark.medium)
        for framework in FRAMEWORKS
        for check in CHECKS
        if check != WHOLE
    ],
)
def test_every_planted_mistake_is_named(framework: str, check: str, tmp_path: Path) -> None:
    for mistake in graded("serving", framework).grader.mistakes:
        if mistake.check != check:
            continue
        file = f"{mistake.file}.py"
        changed = mistake.planted_in(TRACK.solutions(framework)[file])
        found = judged(framework, tmp_path, check, {file: changed})
        assert found["state"] == "wrong", mistake.name
        assert found["mistakes"] == [[mistake.name, mistake.source]], mistake.name
        assert "expected" in found["text"]


TILED = """    groups = query.shape[-3] // key.shape[-3]
    key, value = (torch.cat([x] * groups, dim=-3) for x in (key, value))
    if isinstance(mask, str):
        mask = causal_mask(query.shape[-2], key.shape[-2], query.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
"""
FIRST_KEY = """    causal = isinstance(mask, str)
    return F.scaled_dot_product_attention(
        query, key, value, None if causal else mask, is_causal=causal, scale=scale, enable_gqa=True
    )
"""
RIGHT = """    if isinstance(mask, str):
        mask = torch.ones(query.shape[-2], key.shape[-2]).tril(key.shape[-2] - query.shape[-2]).log()
    groups = query.shape[-3] // key.shape[-3]
    key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
"""
WITH_F = ("import torch\n", "import torch\nimport torch.nn.functional as F\n")
LOOP = """        found = []
        for row in range(len(self.caches)):
            key_row, value_row, _ = self.caches[row].update_and_fetch(key[row, None], value[row, None])
            found.append((key_row[0], value_row[0]))
        longest = max(k.shape[1] for k, _ in found)
        keys, values = (torch.zeros(len(found), key.shape[1], longest, key.shape[3]) for _ in range(2))
        mask = torch.full((len(found), 1, key.shape[2], longest), float("-inf"))
        for row, (k, v) in enumerate(found):
            keys[row, :, HERE], values[row, :, HERE] = k, v
            for query in range(key.shape[2]):
                mask[row, 0, query, : k.shape[1] - key.shape[2] + query + 1] = 0
        return keys, values, mask
"""
NIBBLES = """    bytes_ = w.weight.int()
    if w.bits == 4:
        q = torch.empty(bytes_.shape[0], 2 * bytes_.shape[1])
        q[:, FIRST::2], q[:, SECOND::2] = bytes_ % 16, bytes_ // 16
    else:
        q = bytes_.float()
    spread = [x.repeat_interleave(w.group_size, dim=1) for x in (w.scales, w.biases)]
    return torch.addcmul(spread[1], q, spread[0])
"""
TWO_PASSES = """    positions = torch.arange(query.shape[-2])[:, None] + OFFSET
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("...le,...se->...ls", query.float() * scale, key.float())
    if causal:
        scores[..., torch.arange(key.shape[-2])[None] > positions] = float("-inf")
    return (scores.softmax(-1) @ value.float()).to(query.dtype)
"""
MATCH = """        known = []
        for end in range(self.pool.page_size, len(tokens), self.pool.page_size):
            if tuple(tokens[:end]) not in self.pages:
                break
            known.append(tuple(tokens[:end]))
        for key in known[::-1]:
            page = self.pages[key]
            del self.pages[key]
            self.pages[key] = page
            self.pool.hold(page)
        return [self.pages[key] for key in known]
"""
STEP = """        for _ in range(min(self.batch_size - len(self.running), len(self.waiting))):
            self.running, self.waiting = [*self.running, self.waiting[0]], self.waiting[1:]
        ready = [request for request in self.running if request.tokens]
        reader = next((request for request in self.running if not request.tokens), None)
        if len(ready) == 1:  # with its own caches, without a batch
            logits = self.model(torch.tensor([[ready[0].tokens[-1]]]), ready[0].caches)
            ready[0].tokens += self.sampler(logits[:, -1]).tolist()
        elif ready:
            layers = range(len(ready[0].caches))
            caches = [BatchKvCache([request.caches[layer] for request in ready]) for layer in layers]
            logits = self.model(torch.tensor([request.tokens[-1:] for request in ready]), caches)
            for row, request in enumerate(ready):
                request.tokens.append(self.sampler(logits[row, -1:])[0].item())
        if reader:
            end = min(len(reader.prompt), reader.read + self.chunk)
            logits = self.model(torch.tensor(reader.prompt[reader.read : end])[None], reader.caches)
            reader.read = end
            if end == len(reader.prompt):
                reader.tokens = self.sampler(logits[:, -1]).tolist()
        over = []
        for request in self.running:
            if request.tokens and request.tokens[-1] in self.eos_ids:
                request.tokens = request.tokens[:-1]
                over.append(request)
            elif len(request.tokens) >= request.max_tokens:
                over.append(request)
        self.running = [request for request in self.running if all(request is not each for each in over)]
        return over
"""
ROUNDS = """    written = []
    while True:
        text, guesses = [*prompt, *written], []
        while len(guesses) < count:
            unread = [*text, *guesses][draft_caches[0].offset :]
            guesses.append(draft_model(torch.tensor([unread]), draft_caches)[0, -1].argmax().item())
        logits = model(torch.tensor([[*text, *guesses][caches[0].offset :]]), caches)
        settled = accept_greedy(guesses, logits[0, -count - 1 :].argmax(-1).tolist())
        ends = [place for place, token in enumerate(settled) if token in eos_ids]
        if ends:
            return [*written, *settled[: ends[0]]][:max_tokens]
        written += settled
        if len(written) >= max_tokens:
            return written[:max_tokens]
        longest = len(prompt) + len(written) - 1
        for cache in (*caches, *draft_caches):
            if cache.offset > longest:
                cache.rewind(cache.offset - longest)
"""
ROOM = """        end = self.offset + key.shape[2]
        if self.key is None or end > self.key.shape[2]:
            room = ZEROS((*key.shape[:2], end + 16, key.shape[3]))
            grown = [CONCATENATE([part, room], 2) for part in (key[:, :, :0], value[:, :, :0])]
            if self.key is not None:
                for part, old in zip(grown, (self.key, self.value)):
                    part[:, :, : self.offset] = old[:, :, : self.offset]
            self.key, self.value = grown
        self.key[:, :, self.offset : end], self.value[:, :, self.offset : end] = key, value
        self.offset = end
        return self.key[:, :, :end], self.value[:, :, :end], "causal"
"""
PAIRS = {
    "match": """        found, before = [], None
        size = self.pool.page_size
        for start in range(0, len(tokens) - size, size):
            key = (before, tuple(tokens[start : start + size]))
            if key not in self.pages:
                break
            before = self.pages[key]
            found.append(key)
        pages = [self.pages[key] for key in found]
        for key in reversed(found):
            self.pages[key] = self.pages.pop(key)
            self.pool.hold(self.pages[key])
        return pages
""",
    "insert": """        new, before, size = [], None, self.pool.page_size
        for number in range(len(tokens) // size):
            key = (before, tuple(tokens[number * size : (number + 1) * size]))
            if key not in self.pages:
                new.append((key, pages[number]))
            before = self.pages.get(key, pages[number])
        for key, page in reversed(new):
            self.pages[key] = page
            self.pool.hold(page)
""",
    "evict": """        gone = [key for key, page in self.pages.items() if self.pool.holders[page] == 1][:count]
        for key in gone:
            self.pool.release(self.pages.pop(key))
        return len(gone)
""",
}
MLX_ATTENTION = """    scale = query.shape[-1] ** -0.5 if scale is None else scale
    S = key.shape[-2]
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
    if mask is not None:
        mask = mx.broadcast_to(mask, (*query.shape[:-1], S)).reshape(-1, *query.shape[-3:-1], S)
    return mx.fast.scaled_dot_product_attention(*flat, scale=scale, mask=mask).reshape(query.shape)
"""
MLX_NORM = """        normed = mx.fast.rms_norm(x.astype(mx.float32), None, self.eps)
        return normed.astype(x.dtype) * self.weight
"""
MLX_NIBBLES = """    q = w.weight
    if w.bits == 4:
        q = mx.concatenate([(q % 16)[..., None], (q // 16)[..., None]], axis=2).reshape(len(q), -1)
    scales, biases = (mx.repeat(x, w.group_size, axis=1) for x in (w.scales, w.biases))
    return q * scales + biases
"""


@pytest.mark.parametrize("check", ["KvCache.update_and_fetch", "KvCache.rewind"])
def test_a_cache_with_room_to_spare_passes(framework: str, check: str, tmp_path: Path) -> None:
    names = {"torch": ("torch.zeros", "torch.cat"), "mlx": ("mx.zeros", "mx.concatenate")}[framework]
    room = ROOM.replace("ZEROS", names[0]).replace("CONCATENATE", names[1])
    files = rewritten_all(framework, "kv_cache.py", {"update_and_fetch": room, "rewind": "        self.offset -= n"})
    assert judged(framework, tmp_path, check, files) == {"state": "passed"}
    wrong = {"update_and_fetch": room, "rewind": "        self.offset -= 2 * (n // 2)"}
    if check == "KvCache.rewind":
        assert judged(framework, tmp_path, check, rewritten_all(framework, "kv_cache.py", wrong))["state"] == "wrong"


METHODS = ("match", "insert", "evict")
CARELESS = [
    ("match", "            self.pool.hold(self.pages[key])\n", ""),
    ("match", "reversed(found)", "found"),
    ("match", "len(tokens) - size, size", "len(tokens) - size + 1, size"),
    ("match", "key = (before,", "key = (None,"),
    ("insert", "            self.pool.hold(page)\n", ""),
    ("insert", "reversed(new)", "new"),
    ("insert", "before = self.pages.get(key, pages[number])", "before = pages[number]"),
    ("evict", "[:count]", "[: count + 1]"),
    ("evict", "if self.pool.holders[page] == 1", ""),
    ("evict", "return len(gone)", "return count"),
]


@pytest.mark.parametrize("method", METHODS)
def test_a_prefix_cache_is_judged_by_what_it_does_where_its_keys_are_others(
    framework: str, method: str, tmp_path: Path
) -> None:
    files = rewritten_all(framework, "prefix_cache.py", PAIRS)
    assert judged(framework, tmp_path, f"PrefixCache.{method}", files) == {"state": "passed"}
    for where, old, new in CARELESS:
        if where == method:
            assert old in PAIRS[method]
            changed = {**PAIRS, method: PAIRS[method].replace(old, new)}
            files = rewritten_all(framework, "prefix_cache.py", changed)
            assert judged(framework, tmp_path, f"PrefixCache.{method}", files)["state"] == "wrong", (old, new)


def with_f(files: dict[str, str]) -> dict[str, str]:
    return {name: text.replace(*WITH_F, 1) for name, text in files.items()}


def attention_file(body: str) -> dict[str, str]:
    return with_f(rewritten("torch", "attention.py", GROUPED, body))


@pytest.mark.parametrize(
    ("check", "files", "names"),
    [
        (GROUPED, attention_file(TILED), ["the heads of keys are tiled, not repeated"]),
        (GROUPED, attention_file(FIRST_KEY), ["the causal mask is made for queries at the beginning"]),
        (
            "BatchKvCache.update_and_fetch",
            rewritten("torch", "batch.py", "update_and_fetch", LOOP.replace("HERE", "longest - k.shape[1] :")),
            ["the zeros stand before a request's positions, not behind them"],
        ),
        (
            "dequantize_weights",
            rewritten("torch", "quantize.py", "dequantize_weights",
                      NIBBLES.replace("FIRST", "1").replace("SECOND", "0")),
            ["the two numbers of a byte are exchanged"],
        ),
        (
            "flash_attention",
            rewritten("torch", "flash_attention.py", "flash_attention", TWO_PASSES.replace("OFFSET", "0")),
            ["the queries stand at the beginning, where they are the last of S positions"],
        ),
        (
            "accept_greedy",
            rewritten("torch", "speculative.py", "accept_greedy",
                      "    kept = [d for d, t in zip(draft, target) if d == t]\n"
                      "    wrong = [i for i, (d, t) in enumerate(zip(draft, target)) if d != t] + [len(draft)]\n"
                      "    return kept + [target[wrong[0]]]"),
            ["a guess is accepted after a mismatch"],
        ),
        (
            "speculative_generate",
            rewritten("torch", "speculative.py", "speculative_generate",
                      ROUNDS.replace("(*caches, *draft_caches)", "caches")),
            ["the small model's caches do not forget what was refused"],
        ),
        (
            "merge_block",
            rewritten("torch", "flash_attention.py", "merge_block",
                      "    new = torch.maximum(maximum, scores.max(-1, keepdim=True).values)\n"
                      "    old, weights = (maximum - new).exp(), (scores - new).exp()\n"
                      "    return new, total / old + weights.sum(-1, keepdim=True), output / old + weights @ value"),
            ["the factor for the sums so far is inverted"],
        ),
        (
            SIMPLE,
            replaced("torch", "attention.py", (" * scale\n    if mask", "\n    if mask"),
                     ("softmax(scores, -1) @", "softmax(scores, -2) @")),
            ["the scale is left out", "the softmax is over the queries, not over the keys"],
        ),
    ],
    ids=["tiled", "first key", "padding", "nibbles", "L and S", "mismatch", "no rewind", "inverted", "two at once"],
)  # fmt: skip
def test_a_mistake_is_named_however_it_is_written(
    check: str, files: dict[str, str], names: list[str], tmp_path: Path
) -> None:
    found = judged("torch", tmp_path, check, files)
    assert found["state"] == "wrong", found
    assert len(found["mistakes"]) == len(names), found
    for (got, _), name in zip(found["mistakes"], names, strict=True):
        assert got.startswith(name), found


UNNAMED = [
    (SIMPLE, "attention.py", ("scale = query.shape[-1] ** -0.5 if", "scale = (query.shape[-1] + 1) ** -0.5 if")),
    ("RoPE", "positional_encoding.py", ("(a * cos - b * sin,", "(a * cos,")),
    ("MLP", "layers.py", ("project(x, self.w_up), self.w_down)", "project(x, self.w_up) ** 2, self.w_down)")),
    ("TransformerBlock", "model.py", ("return h + self.mlp", "return 0.5 * h + self.mlp")),
    ("distribution", "sampler.py", (" / temp, -1)", " / (temp + 1), -1)")),
    ("KvCache.update_and_fetch", "kv_cache.py", ("self.offset += key.shape[2]", "self.offset += key.shape[3]")),
    ("dequantize_weights", "quantize.py", ("(groups * w.scales", "((groups - 8) * w.scales")),
    ("merge_block", "flash_attention.py", ("output * correction +", "output * correction * correction +")),
    ("PagedKvCache.fetched", "paged_cache.py", (": self.offset]", ": self.offset - 1]")),
    ("PrefixCache.evict", "prefix_cache.py", ("holders[page] == 1", "holders[page] == 2")),
    ("accept_sampled", "speculative.py", ("uniform[i] * q[draft[i]]", "uniform[i] ** 2 * q[draft[i]]")),
]
LONG = ("RoPE", "distribution", "TransformerBlock", "accept_sampled")
"""Checks of so many mistakes that all pairs of them take long."""


@pytest.mark.parametrize(
    ("framework", "check", "file", "change"),
    [
        pytest.param(framework, *case, marks=pytest.mark.medium if framework == "mlx" or case[0] in LONG else [])
        for framework in FRAMEWORKS
        for case in UNNAMED
    ],
)
def test_another_mistake_is_wrong_and_has_no_name(
    framework: str, check: str, file: str, change: tuple[str, str], tmp_path: Path
) -> None:
    found = judged(framework, tmp_path, check, replaced(framework, file, change))
    assert found["state"] == "wrong"
    assert found["mistakes"] == []


@pytest.mark.parametrize(
    ("framework", "check", "files"),
    [
        ("torch", GROUPED, attention_file(RIGHT)),
        ("torch", "BatchKvCache.update_and_fetch",
         rewritten("torch", "batch.py", "update_and_fetch", LOOP.replace("HERE", ": k.shape[1]"))),
        ("torch", "dequantize_weights",
         rewritten("torch", "quantize.py", "dequantize_weights", NIBBLES.replace("FIRST", "0").replace("SECOND", "1"))),
        ("torch", "flash_attention",
         rewritten("torch", "flash_attention.py", "flash_attention",
                   TWO_PASSES.replace("OFFSET", "key.shape[-2] - query.shape[-2]"))),
        ("torch", "RMSNorm",
         rewritten("torch", "layers.py", "__call__",
                   "        return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps)"
                   ".type_as(x) * self.weight")),
        ("torch", "draw",
         rewritten("torch", "sampler.py", "draw",
                   "    ends = probabilities.cumsum(-1)\n"
                   "    return torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True)[:, 0]")),
        ("torch", "PrefixCache.match", rewritten("torch", "prefix_cache.py", "match", MATCH)),
        ("torch", "Batcher.step", rewritten("torch", "batch.py", "step", STEP)),
        ("torch", "speculative_generate", rewritten("torch", "speculative.py", "speculative_generate", ROUNDS)),
        ("mlx", SIMPLE, rewritten("mlx", "attention.py", SIMPLE, MLX_ATTENTION)),
        ("mlx", "RMSNorm", rewritten("mlx", "layers.py", "__call__", MLX_NORM)),
        ("mlx", "dequantize_weights", rewritten("mlx", "quantize.py", "dequantize_weights", MLX_NIBBLES)),
    ],
    ids=["PyTorch's attention", "loops", "repeated scales", "two passes", "PyTorch's norm", "searchsorted",
         "a loop over ends", "another scheduler", "other rounds",
         "MLX's attention", "MLX's norm", "repeated scales in MLX"],
)  # fmt: skip
def test_what_is_right_passes_however_it_is_written(
    framework: str, check: str, files: dict[str, str], tmp_path: Path
) -> None:
    assert judged(framework, tmp_path, check, files) == {"state": "passed"}


def test_a_mistake_shows_only_where_it_is_made(tmp_path: Path) -> None:
    framework = "torch"
    files = {
        **replaced(framework, "attention.py", ("arange(S)[None, :] > positions", "arange(S)[None, :] > positions + 1")),
        **replaced(framework, "kv_cache.py", ("self.offset += key.shape[2]", "self.offset += 1")),
        **replaced(framework, "speculative.py", ("return [*draft[:accepted], target[accepted]]", "return [target[0]]")),
    }
    states = {check: judged(framework, tmp_path, check, files)["state"] for check in CHECKS}
    assert [check for check, state in states.items() if state != "passed"] == [
        "causal_mask", WHOLE, "KvCache.update_and_fetch", "accept_greedy",
    ]  # fmt: skip


def test_a_result_that_is_no_array_is_an_error_in_one_line(framework: str, tmp_path: Path) -> None:
    for body, text in (("    return None", "got None"), ("    return 3.0", "got float"), ("    x = y", "'y' is not")):
        found = judged(framework, tmp_path, "silu", rewritten(framework, "basics.py", "silu", body))
        assert found["state"] == "error"
        assert re.search(text, found["text"]), found
        assert "\n" not in found["text"]
