"""`llamita generate`, called as a user calls it, on a small model with random weights."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.cli.generate import harmless, read_prompt
from llamita.cli.main import main
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.storage import files, model_directory
from llamita.text.bpe import train_bpe_from_iterator

CONFIG = ModelConfig(
    vocab_size=290,  # more than the tokenizer has, as in models with a padded vocabulary
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    with files.atomic_directory(path) as directory:
        model_directory.save_tensors(directory, to_host_arrays(build_model(CONFIG, seed=3)))
        model_directory.save_config(directory, CONFIG)
        train_bpe_from_iterator(["The fox gave the owl a red kite. 🦙 naïve. " * 20], 288).save(directory)
    return path


def expected(model: Path, prompt: str, **params: object) -> str:
    return LLM.load(model, backend="torch", device="cpu").generate(prompt, SamplingParams(**params)).text


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments), "--device", "cpu"])


def test_it_prints_the_prompt_and_its_continuation(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = expected(model, "The fox", seed=5, max_tokens=20)
    assert generate(model, "The fox", "--seed", 5, "--max-tokens", 20) == 0
    assert capsys.readouterr() == (f"The fox{text}\n", "")
    assert generate(model, "The fox", "--seed", 5, "--max-tokens", 20, "--no-echo") == 0
    assert capsys.readouterr().out == f"{text}\n"


def test_every_sampling_option_reaches_the_engine(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = {
        "temperature": 0.7,
        "top_k": 30,
        "top_p": 0.8,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "seed": 6,
        "max_tokens": 25,
    }
    flags = [part for name, value in params.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert generate(model, "The", *flags, "--no-echo") == 0
    assert capsys.readouterr().out == expected(model, "The", **params) + "\n"
    text = expected(model, "The", temperature=0, max_tokens=40)
    stop = text[10:13]
    assert generate(model, "The", "--temperature", 0, "--max-tokens", 40, "--stop", stop, "never", "--no-echo") == 0
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"


def test_token_ids_can_be_the_prompt(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = LLM.load(model, backend="torch", device="cpu").encode("The fox")
    assert generate(model, "--prompt-tokens", *ids, "--temperature", 0, "--max-tokens", 8) == 0
    assert capsys.readouterr().out == "The fox" + expected(model, "The fox", temperature=0, max_tokens=8) + "\n"


def test_a_model_without_a_tokenizer_prints_ids(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(model / name)
    assert generate(tmp_path, "--prompt-tokens", 1, 40, "--max-tokens", 3) == 0
    assert re.fullmatch(r"1 40 \d+ \d+ \d+\n", capsys.readouterr().out)


def test_statistics_go_to_standard_error_and_name_a_seed_that_gives_the_text_again(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, "The fox", "--max-tokens", 12, "--statistics", "--ignore-eos") == 0
    out, err = capsys.readouterr()
    found = re.fullmatch(
        r"warm-up: [\d.]+ s; "
        r"prefill: (\d+) tokens in [\d.]+ s, [\d.]+ tokens/s; decode: 11 tokens in [\d.]+ s, [\d.]+ tokens/s, "
        r"[\d.]+ GB/s read; in float32 \(the file.s own\), (?:\w+ kernels|PyTorch.s operators) \(.*\).*; "
        r"12 generated; seed (\d+); finished: length\n",
        err,
    )
    assert found, err
    assert out == "The fox" + expected(model, "The fox", seed=int(found[2]), max_tokens=12, ignore_eos=True) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "x"], "error: nowhere does not exist"),
        (["MODEL", "x", "--prompt-tokens", "1"], "error: both a prompt and --prompt-tokens"),
        (["MODEL", "--prompt-tokens", "1", "290"], "error: the prompt has token id 290"),
        (["MODEL", "fox " * 5000], "error: the prompt has"),
        (["MODEL", "x", "--device", "abacus"], "error: device="),
        (["MODEL", "x", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["MODEL", "x", "--top-p", "0"], "top_p=0.0 is not allowed"),
        (["MODEL", "x", "--max-tokens", "none"], "--max-tokens"),
    ],
)
def test_a_users_mistake_is_explained_without_a_traceback(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *[str(model) if argument == "MODEL" else argument for argument in arguments]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    if message.startswith("error: "):
        assert err.count("\n") == 1


class Fed(io.TextIOWrapper):
    """Standard input as a pipe gives it."""

    def __init__(self, data: bytes) -> None:
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        super().__init__(os.fdopen(reader, "rb"))


@pytest.mark.parametrize(
    ("data", "prompt"),
    [(b"The fox\n", "The fox"), (b"a\n\n", "a\n"), (b"a\r\n", "a"), ("né".encode(), "né"), (b"", "")],
)
def test_a_pipe_is_the_prompt_less_its_last_newline(data: bytes, prompt: str) -> None:
    for given in (None, "-"):
        with Fed(data) as stdin:
            assert read_prompt(given, stdin) == prompt


def test_a_prompt_given_wins_over_a_pipe_and_a_terminal_is_not_waited_for() -> None:
    with Fed(b"unread") as stdin:
        assert read_prompt("given", stdin) == "given"
    with open(os.devnull) as stdin:
        assert read_prompt(None, stdin) == ""


def test_a_pipe_that_is_not_utf8_is_refused() -> None:
    with Fed(b"caf\xe9") as stdin, pytest.raises(ValueError, match=r"is not UTF-8 \(byte 3\)"):
        read_prompt(None, stdin)


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert harmless("a\x1b]0;x\x07\tb\r\n\x9b2J né 🦙") == "a\ufffd]0;x\ufffd\tb\ufffd\n\ufffd2J né 🦙"


def test_ctrl_c_and_a_closed_pipe_end_it_quietly(model: Path) -> None:
    command = [sys.executable, "-m", "llamita.cli.main", "generate", str(model), "The fox", "--max-tokens", "4000"]
    options = [*command, "--ignore-eos", "--device", "cpu", "--statistics"]
    with subprocess.Popen(options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        start = os.read(process.stdout.fileno(), 7)  # the prompt is printed once the model is loaded
        while len(start) < 40:
            start += os.read(process.stdout.fileno(), 40)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert start.startswith(b"The fox")
    assert rest.endswith(b"\n")
    assert re.fullmatch(rb"warm-up: [\d.]+ s; prefill: .*; finished: interrupted\n", err), err

    with subprocess.Popen(options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        os.read(process.stdout.fileno(), 7)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert err == b""
    assert process.returncode == 141
