"""The grader names each planted mistake, however it is written, and gives no wrong name to any other."""

from pathlib import Path

import pytest

from tests.learn.graded import Graded

LLAMA = Graded("min-llama", "torch")
TRACK, SOLUTIONS, GRADER = LLAMA.track, LLAMA.solutions, LLAMA.grader
judged, replaced = LLAMA.judged, LLAMA.replaced


def test_the_solutions_pass_every_check(tmp_path: Path) -> None:
    for check in GRADER.checks:
        assert judged(tmp_path, check, {}) == {"state": "passed"}, check


def test_skeletons_are_not_yet_written(tmp_path: Path) -> None:
    for check in GRADER.checks:
        assert judged(tmp_path, check, TRACK.skeletons("torch")) == {"state": "not written"}, check


def test_there_are_many_mistakes() -> None:
    assert len({mistake.name for mistake in GRADER.mistakes}) >= 90
    assert {mistake.check for mistake in GRADER.mistakes} == set(GRADER.checks) - {"Llama.forward"}


@pytest.mark.parametrize("check", sorted({mistake.check for mistake in GRADER.mistakes}))
def test_every_planted_mistake_is_named(check: str, tmp_path: Path) -> None:
    for mistake in GRADER.mistakes:
        if mistake.check != check:
            continue
        file = f"{mistake.file}.py"
        found = judged(tmp_path, check, {file: mistake.planted_in(SOLUTIONS[file])})
        assert found["state"] == "wrong"
        assert found["mistakes"] == [[mistake.name, mistake.source]], mistake.name
        assert "expected" in found["text"]
        assert "(shape (" in found["text"]


SCORES = "Attention.compute_query_key_value_scores"
BODY = SOLUTIONS["llama.py"][SOLUTIONS["llama.py"].index("        # to do: products") :]
BODY = BODY[: BODY.index("        # done")]
STEP = SOLUTIONS["optimizer.py"][SOLUTIONS["optimizer.py"].index("                # to do: create") :]
STEP = STEP[: STEP.index("                # done")]
PLAIN_ADAM = """
                import torch.optim.adam as adam
                state.setdefault("step", torch.tensor(0.0))
                m, v = state.setdefault("m", torch.zeros_like(p)), state.setdefault("v", torch.zeros_like(p))
                adam.adam(
                    [p], [grad], [m], [v], [], [state["step"]], amsgrad=False, beta1=beta1, beta2=beta2, lr=lr,
                    weight_decay=0.0, eps=eps, maximize=False, foreach=False, capturable=False, differentiable=False,
                    fused=False, grad_scale=None, found_inf=None, has_complex=False,
                ) if correct_bias else self.plain(p, grad, m, v, lr, beta1, beta2, eps)
                p.mul_(1 - lr * weight_decay)
"""
PLAIN_STEP = """
    def plain(self, p, grad, m, v, lr, beta1, beta2, eps):
        m.lerp_(grad, 1 - beta1)
        v.lerp_(grad**2, 1 - beta2)
        p.addcdiv_(m, v.sqrt() + eps, value=-lr)

    @torch.no_grad()
    def step("""


@pytest.mark.parametrize(
    ("check", "files", "names"),
    [
        (
            SCORES,
            replaced("llama.py", (BODY, "        return F.scaled_dot_product_attention(query, key, value)\n")),
            ["the mask is left out"],
        ),
        (
            SCORES,
            replaced("llama.py", (BODY, """
        query = query * query.shape[-1] ** 0.5  # what the operator divides by
        weights = torch.stack([F.scaled_dot_product_attention(query, key, torch.eye(5).expand(2, 4, 5, 5),
            is_causal=True)])[0]
        return self.attn_dropout(weights) @ value
""")),
            ["the scale is left out"],
        ),
        (
            "apply_rotary_emb",
            replaced("rope.py", ("    query_out, key_out = turned", """
    def rotated(x):
        first, second = x[..., : head_dim // 2], x[..., head_dim // 2 :]
        wide = (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
        return x * wide[0] + torch.cat((-second, first), -1) * wide[1]

    return rotated(query), rotated(key)
    query_out, key_out = turned""")),
            ["the pairs are the two halves of a head"],
        ),
        (
            "AdamW.step",
            replaced("optimizer.py", (STEP, PLAIN_ADAM), ("\n    @torch.no_grad()\n    def step(", PLAIN_STEP)),
            ["the moments themselves are corrected"],
        ),
        (
            SCORES,
            replaced("llama.py", (" / math.sqrt(self.head_dim)", ""), ("triu(1)", "triu(2)")),
            ["the scale is left out", "the mask is one off: a position sees the one after it"],
        ),
    ],
    ids=["no mask", "no scale", "halves", "textbook Adam", "two at once"],
)  # fmt: skip
def test_a_mistake_is_named_however_it_is_written(
    check: str, files: dict[str, str], names: list[str], tmp_path: Path
) -> None:
    found = judged(tmp_path, check, files)
    assert found["state"] == "wrong", found
    if names == ["the mask is left out"]:  # this one has no dropout either
        names = [*names, "attn_dropout is left out"]
    assert len(found["mistakes"]) == len(names), found
    for (got, _), name in zip(found["mistakes"], names, strict=True):
        assert got.startswith(name)


@pytest.mark.parametrize(
    ("check", "file", "change"),
    [
        ("apply_rotary_emb", "rope.py", ("* frequencies[None, :]", "* frequencies[None, :] * 57.29578")),
        ("apply_rotary_emb", "rope.py", ("(real * cos - imag * sin, real * sin", "(real * cos, real * sin")),
        ("RMSNorm._norm", "llama.py", ("x.pow(2).mean(-1, keepdim=True) + self.eps", "x.abs().mean(-1, keepdim=True)")),
        ("RMSNorm._norm", "llama.py", ("mean(-1, keepdim=True) + self.eps", "mean(-1, keepdim=True) + 2 * self.eps")),
        ("RMSNorm.forward", "llama.py", ("type_as(x) * self.weight", "type_as(x) / self.weight")),
        (SCORES, "llama.py", ("math.sqrt(self.head_dim)", "math.sqrt(self.head_dim + 1)")),
        (SCORES, "llama.py", ("weights @ value", "weights @ value.flip(2)")),
        ("Attention.forward", "llama.py", ("key = key.repeat", "key = key.flip(2).repeat")),
        ("FeedForward.SwiGLU", "llama.py", ("F.silu(self.w1(x))", "F.tanh(self.w1(x))")),
        ("LlamaLayer.forward", "llama.py", ("h = x + self.attention", "h = 0.5 * x + self.attention")),
        ("Llama.generate at other temperatures", "llama.py", ("logits / temperature", "logits / (temperature + 1)")),
        ("AdamW.step", "optimizer.py", ("beta2) * grad * grad", "beta2) * grad * grad * grad.abs()")),
        ("AdamW.step", "optimizer.py", ("- beta1**t)", "- beta1 ** max(1, t - 1))")),
        ("LlamaEmbeddingClassifier.forward", "classifier.py", ("state = hidden[", "state = 2 * hidden[")),
    ],
)
def test_another_mistake_is_wrong_and_has_no_name(
    check: str, file: str, change: tuple[str, str], tmp_path: Path
) -> None:
    found = judged(tmp_path, check, replaced(file, change))
    assert found["state"] == "wrong"
    assert found["mistakes"] == []


@pytest.mark.parametrize(
    ("new", "state", "text"),
    [
        ("return x", "wrong", "result[0, 0, 0] is"),
        ("return x[..., 0]", "wrong", "the shape of result is (2, 5), expected (2, 5, 24)"),
        ("return None", "error", "TypeError: expected a tensor, got None"),
        ("return y", "error", "NameError: name 'y' is not defined (llama.py, line"),
        ("raise NotImplementedError", "not written", ""),
        ("raise SystemExit(3)", "error", "exit(3)"),
        ("return )", "error", "SyntaxError: unmatched ')'"),
        ("return self._norm(x)", "error", "RecursionError"),
        ("return x.float().mean(-1, keepdim=True) @ x", "error", "RuntimeError"),
    ],
)
def test_what_is_said_of_code_that_fails(new: str, state: str, text: str, tmp_path: Path) -> None:
    line = "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"
    found = judged(tmp_path, "RMSNorm._norm", replaced("llama.py", (line, new)))
    assert found["state"] == state
    assert text in found.get("text", "")
    assert "\n" not in found.get("text", "")


def test_a_mistake_shows_only_where_it_is_made(tmp_path: Path) -> None:
    files = {**replaced("rope.py", ("(-pairs", "(pairs")), **replaced("llama.py", ("triu(1)", "triu(2)"))}
    states = {check: judged(tmp_path, check, files)["state"] for check in GRADER.checks}
    assert [check for check, state in states.items() if state != "passed"] == [
        "apply_rotary_emb", SCORES, "Llama.forward"
    ]  # fmt: skip


def test_a_file_of_the_readers_own_is_found(tmp_path: Path) -> None:
    files = {
        **replaced(
            "llama.py", ("import math\n", "import math\nimport my_helpers\n"), ("triu(1)", "triu(my_helpers.ONE)")
        ),
        "my_helpers.py": "ONE = 1\n",
    }
    assert judged(tmp_path, SCORES, files) == {"state": "passed"}


def test_a_file_that_is_missing_is_not_the_solutions(tmp_path: Path) -> None:
    judged(tmp_path, SCORES, {})
    (tmp_path / "rope.py").unlink()
    for check in ("apply_rotary_emb", "Llama.forward"):
        found = GRADER.judge(check)
        assert (found["state"], found["text"]) == ("error", f"rope.py is not in {tmp_path}")
    assert GRADER.judge(SCORES) == {"state": "passed"}


def test_the_whole_model_points_to_the_lessons_before(tmp_path: Path) -> None:
    found = judged(tmp_path, "Llama.forward", replaced("llama.py", ("triu(1)", "triu(2)")))
    assert found["text"].endswith("; the lessons before this one say where")


@pytest.mark.parametrize(
    ("check", "files"),
    [
        (
            "apply_rotary_emb",
            replaced("rope.py", ("    query_out, key_out = turned", """
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]

    def by_complex(x):
        return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(3)

    return by_complex(query), by_complex(key)
    query_out, key_out = turned""")),
        ),
        (
            "RMSNorm._norm",
            replaced("llama.py", (
                "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)",
                "return F.rms_norm(x, x.shape[-1:], eps=self.eps)",
            )),
        ),
        (
            SCORES,
            replaced("llama.py", (BODY, """
        rows = []
        for position in range(query.shape[2]):
            seen_key, seen_value = key[:, :, : position + 1], value[:, :, : position + 1]
            scores = torch.einsum("bnh,bnsh->bns", query[:, :, position], seen_key) * self.head_dim**-0.5
            rows.append(torch.einsum("bns,bnsh->bnh", self.attn_dropout(scores.softmax(-1)), seen_value))
        return torch.stack(rows, dim=2)
""")),
        ),
        (
            SCORES,
            replaced("llama.py", ('float("-inf")', "-1e9")),
        ),
        (
            "Llama.generate at other temperatures",
            replaced("llama.py", (
                "idx_next = torch.multinomial(probabilities, num_samples=1)",
                "idx_next = (probabilities.log() - torch.rand_like(probabilities).log().neg().log()).argmax(-1, True)",
            )),
        ),
        (
            "AdamW.step",
            replaced("optimizer.py", (
                "p.sub_(lr * weight_decay * p)",
                "p.data = p.data * (1 - lr * weight_decay)",
            )),
        ),
        (
            "LlamaEmbeddingClassifier.forward",
            replaced("classifier.py", (
                "state = hidden[torch.arange(len(input_ids), device=input_ids.device), last]",
                "state = torch.stack([row[ids.ne(0).nonzero()[-1, 0]] for row, ids in zip(hidden, input_ids)])",
            )),
        ),
    ],
    ids=["complex numbers", "PyTorch's norm", "a loop over positions", "a large number", "Gumbel", "decay", "a loop"],
)  # fmt: skip
def test_what_is_right_passes_however_it_is_written(check: str, files: dict[str, str], tmp_path: Path) -> None:
    assert judged(tmp_path, check, files) == {"state": "passed"}
