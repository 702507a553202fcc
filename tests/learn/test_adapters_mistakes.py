"""Adapters are graded in a course and wherever they lie; each planted mistake is named, and no other wrongly."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamita.cli.main import main
from llamita.learn.grading import grade
from llamita.learn.harness import Grader
from tests.learn.graded import Graded

ADAPTERS = Graded("adapters", "torch")
CHECKS = sorted({mistake.check for mistake in ADAPTERS.grader.mistakes})
pytestmark = pytest.mark.usefixtures("graded_at_once")


def test_solutions_pass_and_skeletons_are_not_yet_written(tmp_path: Path) -> None:
    for check in ADAPTERS.grader.checks:
        assert ADAPTERS.judged(tmp_path, check, {}) == {"state": "passed"}, check
    for check in ADAPTERS.grader.checks:
        assert ADAPTERS.judged(tmp_path, check, ADAPTERS.skeletons) == {"state": "not written"}, check
    for check in ADAPTERS.grader.checks:
        assert ADAPTERS.judged(tmp_path, check, {"adapters.py": "import torch\n"}) == {"state": "not written"}, check


def test_there_are_many_mistakes() -> None:
    assert len(ADAPTERS.grader.mistakes) >= 150
    assert set(CHECKS) == set(ADAPTERS.grader.checks)


@pytest.mark.parametrize("check", CHECKS)
def test_every_planted_mistake_is_named(check: str, tmp_path: Path) -> None:
    for mistake in ADAPTERS.grader.mistakes:
        if mistake.check == check:
            planted = mistake.planted_in(ADAPTERS.solutions["adapters.py"])
            found = ADAPTERS.judged(tmp_path, check, {"adapters.py": planted})
            assert found["state"] == "wrong", mistake.name
            assert found["mistakes"] == [[mistake.name, mistake.source]], mistake.name


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        ("run_linear", "return in_features @ weights.T", "return in_features @ weights.T * 1.1"),
        ("run_silu", "torch.sigmoid(in_features)", "torch.sigmoid(1.702 * in_features)"),
        ("run_softmax", "torch.exp(in_features - in_features", "torch.exp(0.5 * in_features - 0.5 * in_features"),
        ("run_rmsnorm", "keepdim=True) + eps)", "keepdim=True) + 2 * eps)"),
        ("run_scaled_dot_product_attention", "run_softmax(scores, -1) @ V", "run_softmax(scores, -1) @ V.flip(-2)"),
        ("run_rope", "speeds = theta", "speeds = 2 * theta"),
        ("run_transformer_block", "x = in_features + run_multi", "x = 0.5 * in_features + run_multi"),
        ("run_cross_entropy", "targets[..., None]).mean()", "targets[..., None]).mean() ** 2"),
        ("run_gradient_clipping", "max_l2_norm / (norm + 1e-6)", "max_l2_norm / (norm + 0.5)"),
        ("get_adamw_cls", "(1 - beta1) * gradient\n", "(1 - beta1) * gradient.sign()\n"),
        ("run_get_lr_cosine_schedule", "math.cos(math.pi * done)", "math.cos(math.pi * done**2)"),
        ("run_get_batch", "tokens[places + 1].to(device)", "tokens[places].to(device) + 2"),
        ("get_tokenizer", "found += [ids[token]", "found += [1 + ids[token]"),
        ("run_train_bpe", "key=lambda pair: (pairs[pair], pair), d", "key=lambda pair: (-pairs[pair], pair), d"),
    ],
)
def test_another_mistake_is_wrong_and_has_no_name(check: str, old: str, new: str, tmp_path: Path) -> None:
    found = ADAPTERS.judged(tmp_path, check, ADAPTERS.replaced("adapters.py", (old, new)))
    assert found["state"] == "wrong", found
    assert found["mistakes"] == []


@pytest.mark.parametrize(
    ("check", "files"),
    [
        ("run_rope", ADAPTERS.written("run_rope", """
            speeds = 1.0 / theta ** (torch.arange(0, d_k, 2).float() / d_k)
            turn = torch.polar(torch.ones(()), token_positions[..., None].float() * speeds)
            pairs = torch.view_as_complex(in_query_or_key.reshape(*in_query_or_key.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turn).flatten(-2)
        """)),
        ("run_scaled_dot_product_attention", ADAPTERS.written("run_scaled_dot_product_attention", """
            return torch.nn.functional.scaled_dot_product_attention(Q, K, V, mask)
        """)),
        ("get_adamw_cls", ADAPTERS.written("get_adamw_cls", "return torch.optim.AdamW")),
        ("get_adamw_cls", ADAPTERS.replaced(
            "adapters.py",
            ('                    parameter -= lr * group["weight_decay"] * parameter\n', ""),
            ("parameter -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)",
             "parameter -= lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (v.sqrt() + eps)\n"
             '                    parameter -= lr * group["weight_decay"] * parameter'),
        )),
        ("run_gradient_clipping", ADAPTERS.written("run_gradient_clipping", """
            torch.nn.utils.clip_grad_norm_(parameters, max_l2_norm)
        """)),
        ("run_get_batch", ADAPTERS.written("run_get_batch", """
            starts = np.random.randint(0, len(dataset) - context_length, size=batch_size)
            rows = np.stack([dataset[start : start + context_length + 1] for start in starts]).astype(np.int64)
            return torch.tensor(rows[:, :-1], device=device), torch.tensor(rows[:, 1:], device=device)
        """)),
    ],
    ids=["complex numbers", "the operator", "PyTorch's AdamW", "the efficient form", "PyTorch's clipping", "numpy"],
)  # fmt: skip
def test_what_is_right_passes_however_it_is_written(check: str, files: dict[str, str], tmp_path: Path) -> None:
    assert ADAPTERS.judged(tmp_path, check, files) == {"state": "passed"}


def test_a_mistake_below_is_named_in_what_uses_it(tmp_path: Path) -> None:
    files = ADAPTERS.replaced("adapters.py", ("/ math.sqrt(Q.shape[-1])", "/ Q.shape[-1]"))
    for check in ("run_scaled_dot_product_attention", "run_multihead_self_attention", "run_transformer_lm"):
        found = ADAPTERS.judged(tmp_path, check, files)
        assert [name for name, _ in found["mistakes"]] == ["the scale is d_k, not its root"]


PACKAGE = {
    "my_lm/__init__.py": "",
    "my_lm/layers.py": """
import torch
from torch import nn


class Linear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x):
        return torch.einsum("oi,...i->...o", self.weight, x)


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight


def silu(x):
    return x * undefined(x)
""",
    "tests/__init__.py": "",
    "tests/helpers.py": """
def load(module, weight):
    module.load_state_dict({"weight": weight})
    return module
""",
    "tests/adapters.py": """
import torch
from my_lm import layers
from .helpers import load


def run_linear(d_in, d_out, weights, in_features):
    return load(layers.Linear(d_in, d_out), weights)(in_features)


def run_rmsnorm(d_model, eps, weights, in_features):
    return layers.norm(in_features, weights, eps)


def run_silu(in_features):
    return layers.silu(in_features)


def run_softmax(in_features, dim):
    raise NotImplementedError
""",
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of the reader's own, which is the working directory."""
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_is_graded_where_it_lies(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "check", "basics", "--adapters", "tests/adapters.py"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "ok     basics: run_linear"
    assert out[out.index("to do  basics: run_embedding") + 1] == "       not yet written"
    assert "to do  basics: run_softmax" in out
    error = out[out.index("ERROR  basics: run_silu") + 1]
    assert error == "       NameError: name 'undefined' is not defined (layers.py, line 20: return x * undefined(x))"
    at = out.index("WRONG  basics: run_rmsnorm")
    assert out[at + 2] == "       epsilon is added outside the root"
    assert out[-1] == "1 of 5 checks pass"


@pytest.fixture
def graded_file(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], dict[str, Any]]:
    """Judges a check of a file in this process, which keeps nothing of it."""
    monkeypatch.setattr("sys.path", [*sys.path])

    def judged(file: Path, check: str) -> dict[str, Any]:
        before = set(sys.modules)
        try:
            return Grader(ADAPTERS.track.directory, "torch", file).judge(check)
        finally:
            for name in set(sys.modules) - before:
                del sys.modules[name]

    return judged


def test_a_file_alone_in_another_folder_imports_its_neighbours(tmp_path: Path, graded_file: Any) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "neighbour_of_mine.py").write_text("def double(x):\n    return x * 2 / 2\n", "utf-8")
    file = tmp_path / "own" / "grade-me.py"
    file.write_text(
        "import torch\nfrom neighbour_of_mine import double\n"
        "def run_silu(in_features):\n    return double(torch.nn.functional.silu(in_features))\n",
        "utf-8",
    )
    assert graded_file(file, "run_silu") == {"state": "passed"}
    assert graded_file(file, "run_train_bpe") == {"state": "not written"}


def test_a_file_that_cannot_be_imported_says_why(tmp_path: Path, graded_file: Any) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package\n", "utf-8")
    assert graded_file(tmp_path / "broken.py", "run_silu") == {
        "state": "error",
        "text": "ModuleNotFoundError: No module named 'no_such_package' (broken.py, line 1: import no_such_package)",
    }
    (tmp_path / "json.py").write_text("", "utf-8")
    found = graded_file(tmp_path / "json.py", "run_silu")
    assert "json.py cannot be imported: json is " in found["text"]
    assert found["text"].split(" (")[0].endswith("; give it another name")


def test_a_file_that_ends_the_process_is_an_error_of_every_check(tmp_path: Path) -> None:
    (tmp_path / "over.py").write_text("import os\nprint('farewell', flush=True)\nos._exit(7)\n", "utf-8")
    results = list(grade(ADAPTERS.track, "torch", tmp_path / "over.py", "tokenizer"))
    text = "while over.py was imported: the code ended its process with status 7; the last it printed: farewell"
    assert [(result.check, result.state, result.text) for result in results] == [
        ("get_tokenizer", "error", text),
        ("run_train_bpe", "error", text),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapters", "none.py"], "none.py is no file; llamita learn start DIR --track adapters writes one"),
        (["--adapters", "tests/adapters.py", "--directory", "tests"], "is graded where it lies; leave --directory out"),
        (["swimming", "--adapters", "tests/adapters.py"], "there is no lesson 'swimming'; choose one of basics"),
    ],
)
def test_mistakes_in_the_command(
    arguments: list[str], message: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["learn", "check", *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_started_course_grades_its_file_with_its_own_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["learn", "start", "course", "--track", "adapters"]) == 0
    course = tmp_path / "course"
    assert sorted(path.name for path in course.iterdir()) == ["adapters.py", "course.json", "lessons"]
    capsys.readouterr()
    assert main(["learn", "show", "basics", "--directory", "course", "--solution"]) == 0
    (course / "package").mkdir()
    (course / "package" / "solved.py").write_text(capsys.readouterr().out, "utf-8")
    (course / "adapters.py").write_text("from package.solved import *\n", "utf-8")
    assert main(["learn", "check", "basics", "--directory", "course"]) == 0
    assert capsys.readouterr().out.endswith("5 of 5 checks pass\n")
