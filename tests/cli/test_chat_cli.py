"""`llamita chat`, called as a user calls it, on a small model with random weights; and in a terminal of its own."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.cli.chat import changed, end_of_blocks, read_message
from llamita.cli.main import main
from llamita.inference.conversation import Conversation
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.storage import files, model_directory
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import BUILT_IN, Chat

TEXT = "The fox gave the owl a red kite. User: Assistant: by the river. " * 20


def save_model(path: Path, template: str | None, positions: int = 512) -> Path:
    tokenizer = train_bpe_from_iterator([TEXT], 288, reserved_tokens=3)
    tokenizer.chat_templates = {"default": template} if template else {}
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    with files.atomic_directory(path) as directory:
        model_directory.save_tensors(directory, to_host_arrays(build_model(config, seed=3)))
        model_directory.save_config(directory, config)
        tokenizer.save(directory)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", BUILT_IN["r0"])


@pytest.fixture
def llm(model: Path) -> LLM:
    return LLM.load(model, backend="torch", device="cpu")


def talk(model: Path, said: str, *flags: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    return main(["chat", str(model), "--device", "cpu", *map(str, flags)])


def test_answers_remember_what_was_said(
    model: Path, llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    flags = ["--temperature", 0, "--max-tokens", 12, "--ignore-eos", "--system", "Be kind."]
    file = tmp_path / "talk.json"
    said = f'Hello\nAnd \\\nnow?\n"""\na\nb"""\n/save {file}\n/reset\nHello\n/quit\nnever read\n'
    assert talk(model, said, *flags, monkeypatch=monkeypatch) == 0
    conversation = Conversation(Chat(llm.tokenizer), 512, "Be kind.")
    answers = []
    for text in ("Hello", "And \nnow?", "a\nb"):
        answer = llm.generate(conversation.ask(text, 12)[0], conversation.params(params)).text
        conversation.answer(answer)
        answers.append(answer)
    assert json.loads(file.read_text())["messages"] == conversation.messages
    out = capsys.readouterr().out
    assert [part for part in (*answers, answers[0]) if part + "\n" not in out] == []
    assert len(re.findall(r"^\d+ tokens?, [\d.]+ tokens/s", out, re.MULTILINE)) == 4
    assert "never read" not in out


def test_commands_and_slips(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "there").write_text("mine")
    said = (
        f"/help\n/params top_k 5\n/params heat 5\n/params top_p 7\n/nothing\n/save {tmp_path}/there\n/save\n/system a\n"
    )
    assert talk(model, said, monkeypatch=monkeypatch) == 0
    out = " ".join(capsys.readouterr().out.split())
    for expected in (
        "/reset forget what was said",
        "top_k 5",
        "error: there is no parameter 'heat'",
        "error: top_p=7 is not allowed",
        "error: there is no command /nothing",
        "there exists already; choose another name",
        "error: /save needs the name of a file",
        "the system message is set",
    ):
        assert expected in out
    assert (tmp_path / "there").read_text() == "mine"


def test_a_full_context_forgets_the_oldest_and_refuses_what_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = save_model(tmp_path / "small", BUILT_IN["r0"], positions=96)
    said = "the fox by the river gave a kite\n" * 4 + "x" * 500 + "\nthe fox\n"
    assert talk(small, said, "--max-tokens", 20, "--ignore-eos", "--seed", 1, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "the context is full: the 2 oldest messages were forgotten" in out
    assert re.search(r"error: this has \d+ tokens, but the model can read 76; shorten it", out)
    assert out.count("tokens/s") == 5


def test_a_model_without_a_template_says_so_and_takes_a_named_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = save_model(tmp_path / "bare", None)
    assert talk(bare, "Hello\n", monkeypatch=monkeypatch) == 2
    names = "chatml, r0, plain, plain-eos"
    expected = f"error: this model has no chat template; choose one of the built-in ones: {names} with --template\n"
    assert capsys.readouterr().err == expected
    assert talk(bare, "Hello\n", "--template", "plain", "--max-tokens", 3, monkeypatch=monkeypatch) == 0
    assert talk(bare, "Hello\n", "--template", "palin", monkeypatch=monkeypatch) == 2
    assert "there is no chat template 'palin'" in capsys.readouterr().err
    (tmp_path / "mine.jinja").write_text(BUILT_IN["chatml"])
    assert talk(bare, "Hello\n", "--template", tmp_path / "mine.jinja", "--max-tokens", 3, monkeypatch=monkeypatch) == 0


def test_lines_make_a_message() -> None:
    def lines(*given: str) -> str:
        left: Iterator[str] = iter(given)
        return read_message(lambda prompt: next(left))

    assert lines("one") == "one"
    assert lines("one\\", "two\\", "three") == "one\ntwo\nthree"
    assert lines('"""', "a\\", "", 'b"""') == "a\\\n\nb"
    assert lines('"""a"""') == "a"


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one\ntwo", ""),
        ("one\n\ntwo", "one\n\n"),
        ("```\na\n\nb", ""),
        ("a\n\n```\nb\n\nc\n```\n\nd", "a\n\n```\nb\n\nc\n```\n\n"),
    ],
)
def test_markdown_is_printed_in_whole_blocks(text: str, done: str) -> None:
    assert text[: end_of_blocks(text, 0)] == done


def test_parameters_are_set_in_their_types() -> None:
    params = SamplingParams()
    assert changed(params, "temperature 0.5").temperature == 0.5
    assert changed(params, "max_tokens=7").max_tokens == 7
    assert changed(params, "stop END").stop == ("END",)
    assert changed(params, 'stop ["a", "b"]').stop == ("a", "b")
    assert changed(params, "regex 12").regex == "12"
    assert changed(params, "seed null").seed is None


@pytest.mark.medium
def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(model: Path) -> None:
    # No chance draw ends the answer before the signal comes.
    lengths = ["--ignore-eos", "--min-tokens", "480", "--max-tokens", "480"]
    command = [sys.executable, "-m", "llamita.cli.main", "chat", str(model), *lengths]
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(child)
    seen = b""

    def wait_for(pattern: bytes, again: bytes = b"") -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, seen, re.DOTALL)):
            assert time.monotonic() < deadline, seen
            if again and time.monotonic() > deadline - 59:  # a signal just before readline waits is seen with the next
                os.write(parent, again)
                time.sleep(0.5)
            if select.select([parent], [], [], 0.1)[0]:
                seen += os.read(parent, 65536)
        seen = seen[found.end() :]  # what was read once answers no later question

    try:
        wait_for(rb"Ctrl-D leaves.*> ")
        os.write(parent, b"Tell me\n")
        time.sleep(0.3)
        os.write(parent, b"\x03")
        wait_for(rb"tokens.*(stopped|cut off).*> ")
        os.write(parent, b"\x03")
        wait_for(rb"/quit leaves.*> ", again=b"\x03")
        os.write(parent, b"/params min_tokens 3\n")  # no chance draw ends this one sooner
        wait_for(rb"min_tokens 3.*> ")
        os.write(parent, b"/params max_tokens 3\n")
        wait_for(rb"max_tokens 3.*> ")
        os.write(parent, b"Again\n")
        wait_for(rb"\D3 tokens.*> ")
        os.write(parent, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(parent)
