"""The choice of a framework: what auto stands for, what is refused, and what works where neither is installed."""

import contextlib
import gc
import io
import json
import re
import subprocess
import sys

import pytest

import llamita
from llamita.backend import choice
from llamita.cli.main import main
from llamita.data import meadow
from llamita.storage import model_directory
from llamita.training.run_directory import read_manifest
from tests.training.helpers import prepare_stories
from tests.workflows.test_verify import (
    CONFIG,
    model_arrays,
    other_epsilon,
    other_head,
    rotated_otherwise,
    save,
    swapped,
)

# tyro imports torch where sys.modules names it, so the modules are hidden from the search for them instead.
HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
CALLS = """
import contextlib, io, json
from llamita.cli.main import main
found = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code or 0
    found.append([status, out.getvalue(), errors.getvalue()])
print(json.dumps(found))
"""


def run_without(hidden, calls):
    """Status, stdout and stderr of each `llamita ARGUMENTS`, one after the other in a process that cannot import the
    hidden modules."""
    given = json.dumps([[str(argument) for argument in arguments] for arguments in calls])
    command = [sys.executable, "-c", HIDDEN % (list(hidden),) + CALLS]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SMALL = ("hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "num_key_value_heads=1")


def trained(directory, *flags, backend="torch"):
    """A model of one update through the command line, and its data beside it."""
    data = directory / "stories" / "data"
    if not data.exists():
        (directory / "stories").mkdir()
        data = prepare_stories(directory / "stories")
    run = directory / f"run-{backend}"
    small = (
        "--set",
        *SMALL,
        "--data",
        data,
        "--output",
        run,
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--evaluation-rows",
        "2",
    )
    assert main(["train", *map(str, small), "--backend", backend, "--sample-tokens", "4", *flags]) == 0
    return run


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
    monkeypatch.setattr(choice.platform, "machine", lambda: machine[1])
    monkeypatch.setattr(choice, "is_installed", lambda name: installed)
    assert choice.choose(**options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "torch", "device": "gpu"}, "device='gpu' cannot be used .* give auto, cpu, or cuda"),
        ({"backend": "mlx", "device": "cuda"}, "device='cuda' is not one of MLX's; give auto, cpu or gpu"),
        ({"backend": "mlx", "exact": True}, "the exact mode is PyTorch's.* use --backend torch"),
        ({"backend": "mlx", "threads": 2}, "threads=2 cannot be set: MLX chooses its threads itself"),
    ],
)
def test_an_option_that_a_backend_lacks_is_refused_in_one_line(options, words, tmp_path, capsys):
    """By the library and by every verb that has the option."""
    if options["backend"] == "mlx":
        pytest.importorskip("mlx.core")
    run = trained(tmp_path)
    with pytest.raises(ValueError, match=words):
        llamita.load(run, **options)
    flags = [
        part for name, value in options.items() for part in (f"--{name}", *([] if value is True else [str(value)]))
    ]
    capsys.readouterr()
    assert main(["generate", str(run), "--max-tokens", "1", *flags]) == 2
    assert re.fullmatch(f"error: .*{words}.*\n", capsys.readouterr().err)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend='jax' is not one of auto, torch, mlx"):
        llamita.load("nowhere", backend="jax")


def test_the_loader_of_a_backend_is_found_by_its_name():
    torch = choice.load_backend("torch")
    assert torch.name == "torch"
    assert torch.load_runner.__module__ == "llamita.backend.torch.infer.runner"
    assert torch.build_train_step.__module__ == "llamita.backend.torch.train.step"
    pytest.importorskip("mlx.core")
    mlx = choice.load_backend("mlx")
    assert (mlx.name, mlx.device in ("cpu", "gpu")) == ("mlx", True)
    assert mlx.load_runner.__module__ == "llamita.backend.mlx.infer.runner"


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_garbage_collector_rests_while_a_framework_is_imported_and_no_longer(collects, fails, monkeypatch):
    states = []

    def imported(name):
        states.append(gc.isenabled())
        if fails:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return choice

    monkeypatch.setattr(choice.importlib, "import_module", imported)
    monkeypatch.setattr(choice, "BACKEND", None, raising=False)
    try:
        if not collects:
            gc.disable()
        with pytest.raises(ModuleNotFoundError) if fails else contextlib.nullcontext():
            choice.load_backend("torch")
        states.append(gc.isenabled())
    finally:
        gc.enable()
    assert states == [False, collects]


def test_what_needs_no_framework_works_with_neither(tmp_path):
    """Tokenizer, data, counting: in a process in which torch and mlx cannot be imported."""
    (tmp_path / "stories.txt").write_text("\n\n".join(meadow.corpus(0, 200, "train")))
    tokenizer, data = tmp_path / "tokenizer", tmp_path / "data"
    text = tmp_path / "stories.txt"
    calls = (
        ("--help",),
        ("tokenizer", "train", text, "--vocab-size", "300", "--output", tokenizer),
        ("prepare", "--files", text, "--tokenizer", tokenizer, "--output", data),
        ("data", "show", data, "--rows", "1"),
        ("info",),
        ("info", "tiny"),
        *[(verb, "--help") for verb in ("train", "generate", "chat", "evaluate", "verify", "quickstart", "quantize")],
    )
    found = run_without(("torch", "mlx", "mlx_lm"), calls)
    for arguments, (status, _, errors) in zip(calls, found, strict=True):
        assert (status, errors if "error" in errors else "") == (0, ""), arguments


@pytest.mark.parametrize("hidden", ["torch", "mlx"])
def test_a_verb_that_lacks_its_framework_says_in_one_line_what_to_install(hidden, tmp_path):
    run, data = trained(tmp_path), tmp_path / "stories" / "data"
    assert data.is_dir()
    package = hidden if hidden == "torch" else choice.PACKAGES["mlx"]
    verbs = [
        ("train", "--data", data, "--output", tmp_path / "other"),
        ("generate", run),
        ("chat", run, "--template", "plain"),
        ("evaluate", run, "--data", data),
        ("verify", run, "--against", run),
        ("quickstart", "--output", tmp_path / "quick"),
        ("quantize", run, tmp_path / "int8", "--to", "int8"),
    ]
    found = run_without((hidden,), [(*verb, "--backend", hidden) for verb in verbs])
    for verb, (status, out, errors) in zip(verbs, found, strict=True):
        assert status == 2, (verb, out, errors)
        assert errors == (
            f"error: the package {package.strip(chr(39))!r} is not installed; install it with: pip install {package}\n"
        )
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "quick").exists()


def test_only_an_mlx_that_does_not_load_is_called_broken():
    broken = r"MLX is not whole here \(no libmlx.so\); install it with: pip install"
    with pytest.raises(ValueError, match=broken), choice.importing("mlx"):
        raise ImportError("no libmlx.so", name="mlx.core")
    with pytest.raises(ImportError, match="cannot import name"), choice.importing("mlx"):
        raise ImportError("cannot import name 'X' from 'transformers'", name="transformers")


def test_the_library_says_so_too(tmp_path):
    code = (
        HIDDEN % (["torch"],) + "import llamita\n"
        "try: llamita.load('nowhere', backend='torch')\n"
        "except ModuleNotFoundError as error: print(error, error.name)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "the backend torch is not installed; install it with: pip install torch torch\n"


def test_a_model_of_mlx_is_run_by_either_backend(tmp_path, capsys):
    """One model through the command line: trained by MLX, run by either, rounded by either to the same bytes."""
    pytest.importorskip("mlx.core")
    run, data = trained(tmp_path, backend="mlx"), tmp_path / "stories" / "data"
    assert "mlx" in read_manifest(run)["conditions"]
    said = {}
    for backend in ("mlx", "torch"):
        capsys.readouterr()
        on_cpu = ("--backend", backend, "--device", "cpu")
        assert main(["generate", str(run), "Once", "--max-tokens", "8", "--temperature", "0", *on_cpu]) == 0
        assert main(["evaluate", str(run), "--data", str(data), *on_cpu]) == 0
        said[backend] = capsys.readouterr().out
        rounded = tmp_path / f"int8-{backend}"
        assert main(["quantize", str(run), str(rounded), "--to", "int8", "--backend", backend]) == 0
    assert said["mlx"] == said["torch"]
    assert (tmp_path / "int8-mlx" / "model.safetensors").read_bytes() == (
        tmp_path / "int8-torch" / "model.safetensors"
    ).read_bytes()
    assert main(["verify", str(run), "--against", "mlx"]) == 0
    assert "equal within 0.0001" in capsys.readouterr().out
    assert main(["verify", str(run), "--backend", "mlx", "--against", "torch"]) == 0
    assert main(["train", "--output", str(run), "--resume", "--backend", "torch"]) == 0  # the run is either's


def test_chat_runs_on_mlx(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlx.core")
    run = trained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n/quit\n"))
    capsys.readouterr()
    assert main(["chat", str(run), "--template", "plain", "--max-tokens", "4", "--backend", "mlx"]) == 0
    assert "error" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("plant", "place"),
    [(rotated_otherwise, "layers.2"), (swapped, "layers.1"), (other_epsilon, "layers.0"), (other_head, "logits")],
)
def test_an_error_of_one_backend_is_found_by_the_other(plant, place, tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlx.core")
    save(tmp_path / "m", CONFIG, model_arrays())
    config, wrong = plant(model_arrays())
    right = choice.load_backend("mlx").load_runner(tmp_path / "m", "float32", "cpu")
    monkeypatch.setattr("llamita.cli.verify.load_reference", lambda options: right)
    assert main(["verify", str(tmp_path / "m"), "--against", "mlx"]) == 0
    monkeypatch.setattr(model_directory, "load_tensors", lambda directory: wrong)
    monkeypatch.setattr(model_directory, "load_config", lambda directory: config)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "m"), "--against", "mlx"]) == 1
    assert f"the two first differ at {place}" in capsys.readouterr().out


@pytest.mark.medium
def test_the_quickstart_runs_on_mlx(tmp_path, capsys):
    """In the small size where MLX has no GPU; it says so."""
    pytest.importorskip("mlx.core")
    output = tmp_path / "quick"
    flags = ["--steps", "2", "--stories", "300", "--scored-stories", "2", "--output", str(output)]
    assert main(["quickstart", "--backend", "mlx", *flags]) == 0
    out = capsys.readouterr().out
    small = choice.load_backend("mlx").device == "cpu"
    assert ("The small size" in out) == small
    assert read_manifest(output / "run")["identity"]["model"]["hidden_size"] == (64 if small else 128)
    assert "times the floor" in out
