"""The numpy track's grader names each planted mistake, and gives no wrong name to any other."""

from pathlib import Path

import pytest

from tests.learn.graded import Graded

NUMPY = Graded("numpy", "numpy")


def test_solutions_pass_and_skeletons_are_not_yet_written(tmp_path: Path) -> None:
    for check in NUMPY.grader.checks:
        assert NUMPY.judged(tmp_path, check, {}) == {"state": "passed"}, check
    for check in NUMPY.grader.checks:
        assert NUMPY.judged(tmp_path, check, NUMPY.skeletons) == {"state": "not written"}, check


def test_there_are_many_mistakes() -> None:
    assert len(NUMPY.grader.mistakes) >= 200
    assert {mistake.check for mistake in NUMPY.grader.mistakes} == set(NUMPY.grader.checks) - {
        "the model over a directory"
    }


@pytest.mark.parametrize("check", sorted({mistake.check for mistake in NUMPY.grader.mistakes}))
def test_every_planted_mistake_is_named(check: str, tmp_path: Path) -> None:
    for mistake in NUMPY.grader.mistakes:
        if mistake.check == check:
            file = f"{mistake.file}.py"
            found = NUMPY.judged(tmp_path, check, {file: mistake.planted_in(NUMPY.solutions[file])})
            assert found["state"] == "wrong", mistake.name
            assert found["mistakes"] == [[mistake.name, mistake.source]], mistake.name


@pytest.mark.parametrize(
    ("check", "file", "old", "new"),
    [
        ("softmax", "functions.py", "np.exp(x - x.max", "np.exp(0.5 * x - 0.5 * x.max"),
        ("silu", "functions.py", "np.exp(-x)", "np.exp(-1.702 * x)"),
        ("rms_norm", "functions.py", "+ eps)", "+ 2 * eps)"),
        ("angles", "rope.py", "positions[:, None] * speeds", "positions[:, None] ** 2 * speeds"),
        ("rotate_halves", "rope.py", "(a * cos - b * sin, a * sin + b * cos), axis=-1", "(a * cos, b * cos), axis=-1"),
        ("causal_mask", "attention.py", "np.arange(S - T, S)[:, None]", "np.arange(S - T, S)[:, None] + 2"),
        ("attention", "attention.py", "math.sqrt(query.shape[-1])", "math.sqrt(query.shape[-1] + 1)"),
        ("attention", "attention.py", "softmax(scores) @ value", "softmax(scores) @ value[..., ::-1, :]"),
        ("grouped_attention", "attention.py", "(query, np.repeat(key,", "(query, np.repeat(key[..., ::-1, :, :],"),
        ("float32_of", "weights.py", "<< 16", "<< 15"),
        ("self_attention", "llama.py", "config.rope_theta)\n", "2 * config.rope_theta)\n"),
        ("feed_forward", "llama.py", "silu(linear(x", "np.tanh(linear(x"),
        ("one_layer", "llama.py", "x = x + self_attention", "x = 0.5 * x + self_attention"),
        ("forward", "llama.py", "x = embedding(tokens,", "x = 2 * embedding(tokens,"),
        ("sample", "generate.py", "logits / temperature", "logits / (temperature + 1)"),
        ("generate", "generate.py", "yield token\n", "yield token + 1\n"),
        ("cross_entropy", "loss.py", "float(-chosen.mean())", "float(-chosen.mean()) ** 2"),
        ("cross_entropy_gradient", "loss.py", "labels[counted]] -= 1", "labels[counted]] -= 0.9"),
        ("embedding_gradient", "loss.py", "tokens, gradient)\n", "tokens, gradient**2)\n"),
        ("AdamW.step", "optimizer.py", "(1 - beta1**self.steps)", "(1 - beta1 ** (self.steps + 1))"),
    ],
)
def test_another_mistake_is_wrong_and_has_no_name(check: str, file: str, old: str, new: str, tmp_path: Path) -> None:
    found = NUMPY.judged(tmp_path, check, NUMPY.replaced(file, (old, new)))
    assert found["state"] == "wrong", found
    assert found["mistakes"] == []


SCALE = "the scale is left out"
FLOAT64 = "the result is float64, where x is float32: twice the memory and half the speed from here on"
MASKED_FLOAT64 = (
    "the result with a mask is float64, where the arguments are float32; np.where of two plain numbers makes it so"
)
FLOAT_MASK = "the mask is of floats, not of booleans"
MASK = "the mask is left out: a position sees those after it"


@pytest.mark.parametrize(
    ("check", "files", "names"),
    [
        (
            "attention",
            NUMPY.written("attention", """
                forbidden = 0 if mask is None else np.where(mask, 0, -1e9)
                weights = softmax(np.einsum("...th,...sh->...ts", query, key) + forbidden)
                return np.einsum("...ts,...sh->...th", weights, value)
            """),
            [SCALE, MASKED_FLOAT64],
        ),
        (
            "angles",
            NUMPY.written(
                "angles",
                "return np.outer(positions, [theta ** (2 * i / head_size) for i in range(head_size // 2)])",
            ),
            ["the exponent of theta has the wrong sign"],
        ),
        (
            "self_attention",
            NUMPY.replaced(
                "llama.py",
                ("causal_mask(T, key.shape[2])", "None"),
                ("query, key = rotate_halves(query, turn), rotate", "query, _ = rotate_halves(query, turn), rotate"),
            ),
            ["only the query is turned", MASK],
        ),
        (
            "AdamW.step",
            NUMPY.written("step", """
                self.steps += 1
                for name in self.parameters:
                    self.m[name] += (1 - beta1) * (gradients[name] - self.m[name])
                    self.v[name] += (1 - beta2) * (gradients[name] ** 2 - self.v[name])
                    ratio = self.m[name] / (np.sqrt(self.v[name]) + self.eps)
                    self.parameters[name] *= 1 - self.lr * self.weight_decay
                    self.parameters[name] -= self.lr * ratio
            """),
            ["neither m nor v is corrected"],
        ),
        (
            "softmax",
            NUMPY.written("softmax", """
                x -= np.max(x, axis=-1, keepdims=True)
                np.exp(x, out=x)
                x /= np.sum(x, axis=-1, keepdims=True)
                return x
            """),
            ["the argument is changed: the result is written into the caller's array"],
        ),
        (
            "softmax",
            NUMPY.written("softmax", """
                powers = np.e ** (x - np.max(x))
                return powers / np.sum(powers)
            """),
            ["the maximum and the sum are over everything, not over the last axis"],
        ),
        (
            "sample",
            NUMPY.written("sample", """
                sums = softmax(logits / temperature).cumsum(-1)
                return np.count_nonzero(sums <= np.expand_dims(number, -1), axis=-1)
            """),
            ["the result may be past the last token: rounding may leave all sums below the number"],
        ),
        (
            "sample",
            NUMPY.written("sample", """
                sums = np.cumsum(softmax(logits / temperature), axis=-1)
                return (sums > number[..., None]).argmax(-1)
            """),
            ["where rounding leaves all sums below the number, argmax finds no True and gives token 0, not the last"],
        ),
        (
            "attention",
            NUMPY.replaced("attention.py", ("math.sqrt(query", "np.sqrt(query")),
            ["the result is float64, where the arguments are float32; np.sqrt(H) makes it so, math.sqrt(H) does not"],
        ),
        ("causal_mask", NUMPY.written("causal_mask", "return np.tri(T, S, S - T)"), [FLOAT_MASK]),
        (
            "one_layer",
            NUMPY.replaced("llama.py", ("x = x + self_attention(", "x += self_attention(")),
            ["the argument is changed: `x += ...` writes into the caller's array, `x = x + ...` makes another"],
        ),
        (
            "silu",
            NUMPY.written("silu", "return 1 / (1 + np.exp(-x.astype(np.float64)))"),
            ["the product with x is left out: this is the sigmoid", FLOAT64],
        ),
        (
            "generate",
            NUMPY.written("generate", """
                logits = forward(config, weights, tokens, caches)
                token = choose(logits[:, -1])
                if token in stop:
                    return
                yield token
                tokens = np.array([[token]])
            """),
            ["choose is given logits of two axes, (1, vocabulary), where it takes those of one row, (vocabulary,)"],
        ),
        (
            "AdamW.step",
            NUMPY.replaced("optimizer.py", ("        self.steps += 1\n", "")),
            ["the steps are not counted: t stays 0, and 1 - beta ** 0 is 0"],
        ),
        (
            "AdamW.step",
            NUMPY.written("step", """
                self.steps += 1
                for name, p in self.parameters.items():
                    g = gradients[name]
                    m = beta1 * self.m[name] + (1 - beta1) * g
                    self.v[name][...] = beta2 * self.v[name] + (1 - beta2) * g**2
                    p *= 1 - self.lr * self.weight_decay
                    corrected = np.sqrt(self.v[name] / (1 - beta2**self.steps)) + self.eps
                    p -= self.lr * m / (1 - beta1**self.steps) / corrected
            """),
            ["m is begun anew in each step"],
        ),
    ],
    ids=[
        "no scale", "the sign", "two at once", "no correction", "softmax in place", "softmax over everything", "no cap",
        "token 0", "root of numpy", "float mask", "added in place", "gate and float64", "two axes", "no t", "m lost",
    ],
)  # fmt: skip
def test_a_mistake_is_named_however_it_is_written(
    check: str, files: dict[str, str], names: list[str], tmp_path: Path
) -> None:
    found = NUMPY.judged(tmp_path, check, files)
    assert [name for name, _ in found["mistakes"]] == names, found


@pytest.mark.parametrize(
    ("check", "files"),
    [
        ("softmax", NUMPY.written("softmax", """
            greatest = x.max(-1, keepdims=True)
            return np.exp(x - greatest - np.log(np.exp(x - greatest).sum(-1, keepdims=True)))
        """)),
        ("rotate_halves", NUMPY.written("rotate_halves", """
            half = x.shape[-1] // 2
            z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
            return np.concatenate([z.real, z.imag], -1).astype(np.float32)
        """)),
        ("attention", NUMPY.replaced("attention.py", ("scores, -np.inf)\n", "scores, -1e9)\n"))),
        ("grouped_attention", NUMPY.written("grouped_attention", """
            batch, heads, length, size = query.shape
            query = query.reshape(batch, key.shape[1], -1, length, size)
            return attention(query, key[:, :, None], value[:, :, None], mask).reshape(batch, heads, length, size)
        """)),
        ("float32_of", NUMPY.written("float32_of", """
            if dtype == "BF16":
                data, dtype = b"".join(b"\\0\\0" + data[i : i + 2] for i in range(0, len(data), 2)), "F32"
            if dtype not in ("F32", "F16"):
                raise ValueError(dtype)
            return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
        """)),
        ("KeyValueCache.extend", NUMPY.written("extend", """
            self.keys = np.concatenate([self.keys[:, :, : self.length], key], axis=2)
            self.values = np.concatenate([self.values[:, :, : self.length], value], axis=2)
            self.length = self.keys.shape[2]
            return self.keys, self.values
        """)),
        ("cross_entropy", NUMPY.written("cross_entropy", """
            losses = []
            for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.ravel()):
                if label != IGNORED:
                    losses.append(np.logaddexp.reduce(row) - row[label])
            return sum(losses) / len(losses)
        """)),
        ("embedding_gradient", NUMPY.written("embedding_gradient", """
            return (np.arange(vocabulary)[:, None] == tokens[None, :]).astype(gradient.dtype) @ gradient
        """)),
        ("sample", NUMPY.written("sample", """
            sums = np.cumsum(softmax(logits / temperature), axis=-1)
            sums[..., -1] = 1
            return (sums > number[..., None]).argmax(axis=-1)
        """)),
        ("sample", NUMPY.written("sample", """
            found = np.empty(number.shape, int)
            for index in np.ndindex(number.shape):
                probabilities = softmax(logits[index].astype(np.float64) / temperature)
                token = np.searchsorted(np.cumsum(probabilities), number[index], "right")
                found[index] = min(token, logits.shape[-1] - 1)
            return found
        """)),
        ("softmax", NUMPY.written("softmax", """
            x = x.astype(np.float64)
            x -= x.max(axis=-1, keepdims=True)
            np.exp(x, out=x)
            return (x / x.sum(axis=-1, keepdims=True)).astype(np.float32)
        """)),
        ("causal_mask", NUMPY.written("causal_mask", "return np.tri(T, S, S - T, dtype=bool)")),
        ("one_layer", NUMPY.written("one_layer", """
            first, second = (weights[f"{prefix}.{name}_layernorm.weight"] for name in ("input", "post_attention"))
            x = x.copy()
            x += self_attention(config, weights, layer, rms_norm(x, first, config.rms_norm_eps), cache)
            x += feed_forward(weights, layer, rms_norm(x, second, config.rms_norm_eps))
            return x
        """)),
    ],
)  # fmt: skip
def test_what_is_right_passes_however_it_is_written(check: str, files: dict[str, str], tmp_path: Path) -> None:
    assert NUMPY.judged(tmp_path, check, files) == {"state": "passed"}


def test_a_mistake_shows_only_where_it_is_made(tmp_path: Path) -> None:
    files = {
        **NUMPY.replaced("functions.py", ("+ eps)", "- eps)")),
        **NUMPY.replaced("attention.py", (" / math.sqrt(query.shape[-1])", "")),
    }
    states = {check: NUMPY.judged(tmp_path, check, files) for check in NUMPY.grader.checks}
    wrong = [check for check, found in states.items() if found["state"] != "passed"]
    assert wrong == ["rms_norm", "attention", "the model over a directory"]
    assert states[wrong[-1]]["text"].endswith("; the lessons before this one say where")


@pytest.mark.parametrize(
    ("new", "state", "text"),
    [
        ("pass", "error", "TypeError: expected an array, got None: is there a return?"),
        ("return [[1.0], [2.0, 3.0]]", "error", "ValueError"),
        ("return x[0]", "wrong", "the shape of result is (3, 5), expected (2, 3, 5)"),
        ("return 'x'", "error", "TypeError: expected an array of numbers, got str"),
    ],
)
def test_what_is_said_of_other_results(new: str, state: str, text: str, tmp_path: Path) -> None:
    found = NUMPY.judged(tmp_path, "silu", NUMPY.replaced("functions.py", ("return x / (1 + np.exp(-x))", new)))
    assert found["state"] == state
    assert text in found["text"]


@pytest.mark.parametrize(
    ("check", "files", "text"),
    [
        (
            "linear",
            {"functions.py": ("x @ weight.T", "x @ weight.T.astype(float)")},
            "the dtype of the result is float64, expected float32",
        ),
        (
            "causal_mask",
            {"attention.py": ("np.arange(S)[None, :] <= np.arange(S - T, S)[:, None]", "np.tri(T, S, S - T)")},
            "the dtype of the mask of T=4 and S=4 is float64, expected bool",
        ),
        (
            "float32_of",
            {"weights.py": ('"<f2").astype(np.float32)', '"<f2")')},
            "the dtype of the numbers of F16 is float16, expected float32",
        ),
        (
            "float32_of",
            {"weights.py": ('raise ValueError(f"expected F32, F16 or BF16, got {dtype}")', "return np.zeros(1)")},
            "the answer to I64 is an array, expected a ValueError",
        ),
        ("KeyValueCache.extend", {"cache.py": ("self.length = end", "pass")}, "length after call 1 is 0, expected 3"),
    ],
)
def test_what_is_said_reads_as_a_sentence(
    check: str, files: dict[str, tuple[str, str]], text: str, tmp_path: Path
) -> None:
    ((file, change),) = files.items()
    found = NUMPY.judged(tmp_path, check, NUMPY.replaced(file, change))
    assert found.get("text", "") == text
