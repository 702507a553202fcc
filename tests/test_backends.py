"""The choice of a framework: what auto stands for, what is refused, and what works where neither is installed."""

import subprocess
import sys

import pytest

import llamita
from llamita import backends
from llamita.cli.main import main
from llamita.data import meadow
from tests.training.helpers import prepare_stories

# tyro imports torch where sys.modules names it, so the modules are hidden from the search for them instead.
HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
MAIN = "from llamita.cli.main import main; sys.exit(main(%r))"


def run_without(hidden, *arguments):
    """`llamita ARGUMENTS` in a process that cannot import the hidden modules."""
    code = HIDDEN % (list(hidden),) + MAIN % ([str(argument) for argument in arguments],)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("machine", "installed", "options", "expected"),
    [
        (("linux", "x86_64"), True, {}, "torch"),
        (("linux", "aarch64"), True, {}, "torch"),
        (("darwin", "x86_64"), True, {}, "torch"),
        (("darwin", "arm64"), False, {}, "torch"),
        (("darwin", "arm64"), True, {}, "mlx"),
        (("darwin", "arm64"), True, {"exact": True}, "torch"),
        (("darwin", "arm64"), True, {"threads": 2}, "torch"),
        (("darwin", "arm64"), True, {"device": "cpu"}, "mlx"),
        (("darwin", "arm64"), True, {"name": "torch"}, "torch"),
        (("linux", "x86_64"), True, {"device": "cuda:1"}, "torch"),
        (("linux", "x86_64"), True, {"device": "gpu"}, "mlx"),
        (("linux", "x86_64"), False, {"name": "mlx"}, "mlx"),
    ],
)
def test_auto_is_mlx_on_apple_silicon_where_it_is_installed_else_torch(
    machine, installed, options, expected, monkeypatch
):
    monkeypatch.setattr(sys, "platform", machine[0])
    monkeypatch.setattr(backends.platform, "machine", lambda: machine[1])
    monkeypatch.setattr(backends, "is_installed", lambda name: installed)
    assert backends.choose(**options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "jax"}, "backend='jax' is not one of auto, torch, mlx"),
        ({"name": "torch", "device": "gpu"}, "device='gpu' is MLX's; .* cpu or cuda"),
        ({"name": "mlx", "device": "cuda"}, "device='cuda' is not MLX's; .* cpu or gpu"),
        ({"name": "mlx", "exact": True}, "exact is PyTorch's alone"),
        ({"name": "mlx", "threads": 2}, "threads=2 is PyTorch's option"),
    ],
)
def test_an_option_that_a_backend_lacks_is_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as fault:
        backends.load_backend(**options)
    assert "\n" not in str(fault.value)


def test_the_loader_of_a_backend_is_found_by_its_name():
    torch = backends.load_backend("torch")
    assert torch.name == "torch"
    assert torch.load_runner.__module__ == "llamita.torch_backend.runner"
    assert torch.build_train_step.__module__ == "llamita.torch_backend.train_step"
    with pytest.raises(ValueError, match="exact is PyTorch's alone"):
        llamita.load("nowhere", backend="mlx", exact=True)


def test_what_needs_no_framework_works_with_neither(tmp_path):
    """Tokenizer, data, counting: each in a process in which torch and mlx cannot be imported."""
    (tmp_path / "stories.txt").write_text("\n\n".join(meadow.corpus(0, 200, "train")))
    tokenizer, data = tmp_path / "tokenizer", tmp_path / "data"
    text = tmp_path / "stories.txt"
    for arguments in (
        ("--help",),
        ("tokenizer", "train", text, "--vocab-size", "300", "--output", tokenizer),
        ("prepare", "--files", text, "--tokenizer", tokenizer, "--output", data),
        ("data", "show", data, "--rows", "1"),
        ("info",),
        ("info", "tiny"),
        *[(verb, "--help") for verb in ("train", "generate", "chat", "evaluate", "verify", "quickstart", "quantize")],
    ):
        status, _, errors = run_without(("torch", "mlx", "mlx_lm"), *arguments)
        assert (status, errors if "error" in errors else "") == (0, ""), arguments


@pytest.mark.parametrize("hidden", ["torch", "mlx"])
def test_a_verb_that_lacks_its_framework_says_in_one_line_what_to_install(hidden, tmp_path):
    data = prepare_stories(tmp_path / "stories")
    small = ("--set", "hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "num_key_value_heads=1")
    train = ("train", *small, "--data", data, "--output", tmp_path / "run", "--steps", "1", "--batch-size", "2")
    assert main([*map(str, train), "--backend", "torch", "--sample-tokens", "0"]) == 0
    package = hidden if hidden == "torch" else backends.PACKAGES["mlx"]
    verbs = [
        (*train[:-4], "--output", tmp_path / "other"),
        ("generate", tmp_path / "run"),
        ("chat", tmp_path / "run", "--template", "plain"),
        ("evaluate", tmp_path / "run", "--data", data),
        ("verify", tmp_path / "run", "--against", tmp_path / "run"),
        ("quickstart", "--output", tmp_path / "quick"),
    ]
    for verb in verbs:
        status, out, errors = run_without((hidden,), *verb, "--backend", hidden)
        assert status == 2, (verb, out, errors)
        assert errors == (
            f"error: the package {package.strip(chr(39))!r} is not installed; install it with: pip install {package}\n"
        )
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "quick").exists()


def test_the_library_says_so_too(tmp_path):
    code = (
        HIDDEN % (["torch"],) + "import llamita\n"
        "try: llamita.load('nowhere', backend='torch')\n"
        "except ModuleNotFoundError as error: print(error, error.name)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "the backend torch is not installed; install it with: pip install torch torch\n"
