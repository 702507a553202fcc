"""`llamita generate --input --output`: files of prompts, cut off anywhere and gone on with."""

import gzip
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.cli.main import main
from llamita.inference import batch
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.storage import files, model_directory
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import BUILT_IN, Chat


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_bpe_from_iterator(["The fox gave the owl a red kite. 🦙 naïve. " * 20], 288, reserved_tokens=3)
    tokenizer.chat_template = BUILT_IN["r0"]
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    with files.atomic_directory(path) as directory:
        model_directory.save_tensors(directory, to_host_arrays(build_model(config, seed=3)))
        model_directory.save_config(directory, config)
        tokenizer.save(directory)
    return path


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM.load(model, backend="torch", device="cpu")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = {row["index"]: row for row in rows}
    assert len(found) == len(rows), "a line was done twice"
    return found


def arguments(model: Path, source: Path, output: Path, *more: object) -> list[str]:
    given = ["generate", model, "--input", source, "--output", output, "--device", "cpu", *more]
    return [str(argument) for argument in given]


MANY = [{"prompt": f"The fox {number}", "seed": number, "id": f"n{number}"} for number in range(40)]
PARAMS = ("--max-tokens", 16, "--ignore-eos")


def test_each_kind_of_prompt_gives_what_it_gives_alone(
    model: Path, llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "Hello <r2>"}]
    rows = [
        {"prompt": "The fox", "seed": 1, "id": "a"},
        "",
        {"prompt_tokens": [1, 40, 41], "temperature": 0, "max_tokens": 5, "seed": 3},
        {"messages": messages, "seed": 2, "id": 7},
        {"prompt": "naïve 🦙", "seed": None, "stop": "e"},
    ]
    output = tmp_path / "new" / "out.jsonl"
    assert main(arguments(model, write(tmp_path / "in.jsonl", rows), output, *PARAMS)) == 0
    found = read(output)
    free = {"max_tokens": 16, "ignore_eos": True}
    chat = Chat(llm.tokenizer).encode(messages).tokens
    expected = [
        llm.generate("The fox", SamplingParams(seed=1, **free)),
        llm.generate([1, 40, 41], SamplingParams(temperature=0, max_tokens=5, seed=3, ignore_eos=True)),
        llm.generate(chat, SamplingParams(seed=2, **free, stop_token_ids=Chat(llm.tokenizer).end_of_turn[0])),
        llm.generate("naïve 🦙", SamplingParams(seed=found[3]["seed"], **free, stop=("e",))),
    ]
    for index, one in enumerate(expected):
        row = found[index]
        assert (row["text"], row["token_ids"]) == (one.text, list(one.token_ids))
        assert (row["finish_reason"], row["seed"]) == (one.finish_reason, one.statistics.seed)
        prompt, written = one.statistics.prompt_tokens, len(one.token_ids)
        assert (row["usage"]["prompt_tokens"], row["usage"]["completion_tokens"]) == (prompt, written)
    assert [found[index].get("id") for index in range(4)] == ["a", None, 7, None]
    assert [found[0]["prompt"], found[1]["prompt_tokens"], found[2]["messages"]] == ["The fox", [1, 40, 41], messages]
    total = sum(row["usage"]["prompt_tokens"] for row in found.values())
    written = sum(len(row["token_ids"]) for row in found.values())
    summary = rf"4 requests, {total} prompt tokens and {written} generated in [\d.]+ s, [\d.,]+ tokens/s\n"
    assert re.search(summary, capsys.readouterr().err)


def test_what_is_done_is_kept_and_a_torn_line_is_done_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off at every kind of place: the rest is done, and all together equals an uninterrupted run."""
    source, whole, output = write(tmp_path / "in.jsonl", MANY[:6]), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert main(arguments(model, source, whole, *PARAMS)) == 0
    assert main(arguments(model, source, output, *PARAMS)) == 0
    lines = output.read_bytes().splitlines(keepends=True)
    for kept, torn in ((0, 0), (0, 9), (3, 0), (3, 1), (3, len(lines[3]) - 1), (6, 0)):
        output.write_bytes(b"".join(lines[:kept]) + (lines[kept][:torn] if torn else b""))
        capsys.readouterr()
        assert main(arguments(model, source, output, *PARAMS)) == 0
        assert output.read_bytes().startswith(b"".join(lines[:kept]))
        assert read(output) == read(whole)
        err = capsys.readouterr().err
        assert (f"{kept} of 6 are in" in err) == (kept > 0)
        assert f"{6 - kept} requests" in err


@pytest.mark.medium
def test_a_killed_run_goes_on(model: Path, tmp_path: Path, call: Callable[[str, list[str]], Any]) -> None:
    rows = [{"prompt": f"The fox {i}", "seed": i, "max_tokens": 10 + 9 * i} for i in range(40)]  # end one by one
    source, whole, output = write(tmp_path / "in.jsonl", rows), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ("--ignore-eos",)
    assert main(arguments(model, source, whole, *options)) == 0
    kills = 0
    for moment in (0, 9):
        process = call("llamita", arguments(model, source, output, *options))
        deadline = time.monotonic() + 60
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") <= moment):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert kills == 2
    assert main(arguments(model, source, output, *options)) == 0
    assert read(output) == read(whole)


def test_another_input_or_other_options_are_not_mixed_in(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write(tmp_path / "in.jsonl", MANY[:2]), tmp_path / "out.jsonl"
    assert main(arguments(model, source, output, *PARAMS)) == 0
    before = output.read_bytes()
    other = write(tmp_path / "other.jsonl", MANY[:3])
    for given, message in (
        (arguments(model, source, output, "--max-tokens", 9), "was begun with another options"),
        (arguments(model, other, output, *PARAMS), "was begun with another input"),
    ):
        assert main(given) == 2
        assert message in capsys.readouterr().err
    batch.record_path(output).unlink()
    assert main(arguments(model, source, output, *PARAMS)) == 2
    assert "exists already, without the record out.jsonl.made-from.json" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_two_runs_do_not_write_one_file(model: Path, llm: LLM, tmp_path: Path) -> None:
    items = batch.read_items(llm, write(tmp_path / "in.jsonl", MANY[:2]), SamplingParams(max_tokens=2))
    _, first = batch.run_batch(llm, items, tmp_path / "out.jsonl", {})
    next(first)
    with pytest.raises(ValueError, match="another run is writing"):
        batch.run_batch(llm, items, tmp_path / "out.jsonl", {})
    first.close()
    kept, rest = batch.run_batch(llm, items, tmp_path / "out.jsonl", {})
    assert (kept, len(list(rest))) == (1, 1)


def test_tools_arrays_and_compressed_files(llm: LLM, tmp_path: Path) -> None:
    said, tools = [{"role": "user", "content": "look"}], [{"name": "look"}]
    given = [{"messages": said, "tools": tools, "id": 7}, {"prompt": "The fox"}]
    telling = "{{ tools | tojson if tools else '' }}" + BUILT_IN["r0"]
    for number, content in enumerate(
        (json.dumps(given, indent=1), "\n".join(map(json.dumps, given)), json.dumps(given[:1] + given))
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(gzip.compress(content.encode()))
        if number == 2:
            with pytest.raises(ValueError, match=r"entry 2 \(line 1\): the id 7 is that of entry 1 \(line 1\) too"):
                batch.read_items(llm, path, SamplingParams(), telling)
            continue
        asked, plain = batch.read_items(llm, path, SamplingParams(), telling)
        assert llm.tokenizer is not None
        assert asked.request.prompt == Chat(llm.tokenizer, telling).encode(said, tools=tools).tokens
        assert asked.given == given[0]
        assert plain.given == given[1]
    path = write(tmp_path / "bad.jsonl", [{"messages": said, "tools": ["look"]}])
    with pytest.raises(ValueError, match=r"line 1: tools must be a list of objects, got \['look'\]"):
        batch.read_items(llm, path, SamplingParams(), telling)


def test_bad_lines_are_all_named_before_anything_is_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "good", "id": 1},
        "{",
        [1],
        {"text": "a"},
        {"prompt": "a", "messages": []},
        {"prompt": "a", "heat": 1},
        {"prompt": "a", "temperature": -1},
        {"prompt_tokens": [1, 99999]},
        {"prompt": "a", "id": 1},
        {"messages": [{"role": 1}]},
    ]
    output = tmp_path / "out.jsonl"
    assert main(arguments(model, write(tmp_path / "in.jsonl", rows), output)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for number, expected in enumerate(
        [
            "not JSON",
            "expected an object",
            "expected one of prompt, prompt_tokens and messages, got none",
            "got prompt, messages",
            "there is no field 'heat'",
            "temperature=-1 is not allowed",
            "token id 99999",
            "the id 1 is that of line 1 too",
            "message 0 must be an object with a role",
        ],
        2,
    ):
        assert re.search(rf"line {number}: [^;]*{expected}", err), (number, err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--input", "x.jsonl"], "--input and --output go together"),
        (["--input", "none.jsonl", "--output", "o"], "there is no file none.jsonl"),
        (["a prompt", "--input", "x", "--output", "o"], "both --input and a prompt"),
    ],
)
def test_slips_are_one_line(model: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(model), *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_one_that_fails_is_told_and_the_others_are_done(llm: LLM, tmp_path: Path) -> None:
    items = batch.read_items(llm, write(tmp_path / "in.jsonl", MANY[:4]), SamplingParams(max_tokens=4))
    run, calls = llm.runner.run, []

    def failing(*plan: Any) -> Any:
        calls.append(plan)
        if len(calls) == 1:
            raise MemoryError("no room")
        return run(*plan)

    llm.runner.run = failing
    try:
        _, outcomes = batch.run_batch(llm, items[:1], tmp_path / "out.jsonl", {})
        totals = batch.Totals()
        for item, outcome in outcomes:
            batch.count(totals, item, outcome)
    finally:
        del llm.runner.run
    assert (totals.requests, totals.failed) == (1, 1)
    assert "no room" in read(tmp_path / "out.jsonl")[0]["error"]
    _, rest = batch.run_batch(llm, items, tmp_path / "out.jsonl", {})
    assert all(not isinstance(outcome, Exception) for _, outcome in rest)
    assert read(tmp_path / "out.jsonl").keys() == {0, 1, 2, 3}
