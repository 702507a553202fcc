"""`llamita bench` against a real server whose answers are scripted: what is sent, counted, printed and written."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamita.cli.main import main
from llamita.workflows.benchmark import report
from llamita.workflows.benchmark.metrics import Load, RequestRecord, summarize
from tests.workflows.benchmark import scripted_server
from tests.workflows.benchmark.scripted_server import Reply, ScriptedServer, Seen, answer, failure

SECRET = "sk-not-to-be-seen-4711"


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedServer]:
    with scripted_server.serving(lambda seen: failure(500, "no script")) as server:
        yield server


@pytest.fixture
def server(running: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> ScriptedServer:
    """A server with the model `tiny`, which answers with two tokens; the environment has no key."""
    monkeypatch.delenv("LLAMITA_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    running.follow(script())
    return running


def script(
    reply: Callable[[Seen, int], Reply] = lambda seen, number: answer("Hello", " there"),
) -> Callable[..., Reply]:
    """Lists the model `tiny`; answers each completion as `reply` does, which is told its number from 0."""
    count = 0

    def follow(seen: Seen) -> Reply:
        nonlocal count
        if seen.path == "/v1/models":
            return scripted_server.models("tiny", "other")
        count += 1
        return reply(seen, count - 1)

    return follow


def asked(server: ScriptedServer) -> list[Seen]:
    return [seen for seen in server.seen if seen.path != "/v1/models"]


def read(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (directory / "requests.jsonl").read_text().splitlines()]
    return json.loads((directory / "summary.json").read_text()), lines


def record(line: dict[str, Any]) -> RequestRecord:
    fields = RequestRecord.__dataclass_fields__
    return RequestRecord(**{name: line[name] for name in fields} | {"text_times": tuple(line["text_times"])})


def test_each_load_is_sent_counted_and_written(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.follow(script(lambda seen, number: answer("Hello", " there", pause=0.002)))
    output = tmp_path / "out"
    arguments = ["--concurrency", "1", "3", "--rate", "200", "--requests", "9", "--warmup", "2", "--max-tokens", "5"]
    assert main(["bench", server.url, *arguments, "--prompt-words", "12", "--output", str(output)]) == 0
    warm_up = 2 + 2 + 2  # the first load's includes the request with which the server was tried
    assert len(asked(server)) == 3 * 9 + warm_up
    prompts = [seen.body["messages"][0]["content"] for seen in asked(server)]
    assert {len(prompt.split()) for prompt in prompts} == {12}
    assert len(set(prompts)) >= 3 * 9  # those that are counted differ from each other and between loads
    assert {seen.body["max_tokens"] for seen in asked(server)} == {5}
    assert all(seen.body["ignore_eos"] is True and seen.body["model"] == "tiny" for seen in asked(server))

    summary, lines = read(output)
    assert [(load["load"], load["requests"], load["completed"]) for load in summary["loads"]] == [
        ({"concurrency": 1, "rate": None}, 9, 9),
        ({"concurrency": 3, "rate": None}, 9, 9),
        ({"concurrency": None, "rate": 200.0}, 9, 9),
    ]
    assert (summary["ask"]["model"], summary["interrupted"], summary["notes"]) == ("tiny", False, [])
    assert [sum(line["load"] == place for line in lines) for place in range(3)] == [9, 9, 9]
    for place, load in enumerate(summary["loads"]):  # the statistics follow from what was recorded
        records = [record(line) for line in lines if line["load"] == place]
        again = summarize(Load(**load["load"]), records)
        for name in report.LATENCIES:
            found = getattr(again, name)
            for percentile in report.PERCENTILES:
                assert load[name][percentile] == pytest.approx(getattr(found, percentile), abs=5e-6)
        assert load["output_tokens"] == 18
        assert load["output_tokens_per_second"] == pytest.approx(18 / again.duration_seconds, rel=1e-3)
        assert load["prompt_tokens"] == 7 * 9
        assert load["tokens_counted_by"] == "usage"
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "1 at once" in out
    assert "200 a second" in out
    assert out.rstrip().endswith(f"wrote {output}")
    for label in ("time to first token, 99th", "between tokens, median", "per output token, 95th", "output tokens/s"):
        assert label in out


def test_no_more_requests_are_under_way_than_asked_for(server: ScriptedServer) -> None:
    server.follow(script(lambda seen, number: answer("Hello", " there", pause=0.01)))
    assert main(["bench", server.url, "--concurrency", "4", "--requests", "12", "--warmup", "1"]) == 0
    assert server.most_at_once == 4


def test_refusals_and_errors_are_counted_by_kind_and_shown(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(seen: Seen, number: int) -> Reply:
        replies = {
            3: failure(429, "queue full", retry_after="0"),
            4: failure(503, "draining", retry_after="0"),
            6: Reply([scripted_server.chat("x")], cut=True, headers={"retry-after": "0"}),
            7: Reply([scripted_server.chat("x"), scripted_server.event(error={"message": "no memory"})]),
        }
        return replies.get(number, answer("Hello", " there"))

    server.follow(script(reply))
    output = tmp_path / "out"
    assert main(["bench", server.url, "--concurrency", "2", "--requests", "10", "--output", str(output)]) == 0
    summary, lines = read(output)
    kinds = {"http_429": 1, "http_503": 1, "cut_off": 1, "error_in_stream": 1}
    assert summary["loads"][0]["errors"] == kinds
    assert (summary["loads"][0]["requests"], summary["loads"][0]["completed"]) == (10, 6)
    assert summary["loads"][0]["output_tokens"] == 12
    failed = {line["error"]: line["message"] for line in lines if line["error"]}
    assert failed["http_429"] == "queue full"
    assert failed["error_in_stream"] == "no memory"
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["refused", "(429)", "1"] in rows
    assert ["failed", "(cut", "off)", "1"] in rows
    assert ["answered", "in", "full", "6"] in rows


def test_a_load_in_which_nothing_succeeds_is_a_failure_of_the_command(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = failure(429, "full", retry_after="0")
    server.follow(script(lambda seen, number: answer("x") if number < 2 else refused))
    assert main(["bench", server.url, "--concurrency", "1", "--requests", "3"]) == 1
    assert "refused (429)" in capsys.readouterr().out


def test_a_server_without_ignore_eos_is_asked_without_it(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(seen: Seen, number: int) -> Reply:
        return failure(400, "unknown parameter ignore_eos") if "ignore_eos" in seen.body else answer("x")

    server.follow(script(reply))
    arguments = ["bench", server.url, "--concurrency", "1", "--requests", "2", "--warmup", "0"]
    assert main(arguments) == 0
    assert ["ignore_eos" in seen.body for seen in asked(server)] == [True, False, False, False]
    assert "note: the server takes no ignore_eos" in capsys.readouterr().err
    server.follow(script(reply))
    assert main([*arguments, "--ignore-eos", "off"]) == 0
    assert not any("ignore_eos" in seen.body for seen in asked(server))
    assert main([*arguments, "--ignore-eos", "on"]) == 2
    assert "(http_400): unknown parameter ignore_eos" in capsys.readouterr().err


def test_a_server_that_counts_no_tokens_is_noted(server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [scripted_server.chat("x"), scripted_server.finished(), scripted_server.DONE]
    server.follow(script(lambda seen, number: Reply(pieces)))
    assert main(["bench", server.url, "--concurrency", "1", "--requests", "2"]) == 0
    assert "note: the server counts no tokens in its streams" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["variable", "file"])
def test_the_key_is_sent_and_appears_nowhere(
    by: str,
    server: ScriptedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def reply(seen: Seen, number: int) -> Reply:
        return failure(500, f"the key {SECRET} broke me") if number == 4 else answer("x")

    server.follow(script(reply))
    arguments = ["bench", server.url, "--concurrency", "1", "--requests", "5", "--output", str(tmp_path / "out")]
    if by == "file":
        (tmp_path / "key").write_text(SECRET + "\n")
        arguments += ["--key-file", str(tmp_path / "key")]
        monkeypatch.setenv("LLAMITA_API_KEY", "another")
    else:
        monkeypatch.setenv("LLAMITA_API_KEY", SECRET)
    assert main(arguments) == 0
    assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {SECRET}"}
    shown = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert SECRET not in shown.out + shown.err
    assert SECRET.encode() not in written
    assert b"the key *** broke me" in written


def test_prompts_of_a_file_are_sent_in_their_order(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--endpoint", "completions", "--temperature", "0"]
    assert main(["bench", server.url, *arguments, "--concurrency", "1", "--requests", "4", "--warmup", "0"]) == 0
    assert [seen.body["prompt"] for seen in asked(server)[1:]] == ["one", "two", "three", "one"]
    assert {seen.path for seen in asked(server)} == {"/v1/completions"}
    assert {seen.body["temperature"] for seen in asked(server)} == {0.0}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (failure(401, "no"), "wants an API key (401); set LLAMITA_API_KEY or give --key-file FILE"),
        (failure(404, "no model tiny"), "the first request to URL failed (http_404): no model tiny"),
        (failure(429, "busy"), "the first request to URL failed (http_429): busy"),
    ],
)  # fmt: skip
def test_a_server_that_refuses_the_first_request_is_told_in_one_line(
    reply: Reply, message: str, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.follow(script(lambda seen, number: reply))
    assert main(["bench", server.url, "--requests", "2"]) == 2
    err = capsys.readouterr().err
    assert message.replace("URL", server.url) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["URL", "--model", "huge"], "the server at URL has no model 'huge'; it has tiny, other"),
        (["127.0.0.1:8000"], "of a server; expected one such as http://127.0.0.1:8000"),
        (["URL", "--concurrency", "0"], "--concurrency 0 must be at least 1"),
        (["URL", "--rate", "0"], "--rate 0 must be more than 0"),
        (["URL", "--seconds", "nan"], "--seconds nan must be more than 0"),
        (["URL", "--requests", "0"], "--requests 0 must be at least 1"),
        (["URL", "--output", "."], ". exists already; choose another name, or replace it with --overwrite"),
        (["URL", "--prompts", "none.txt"], "there is no file none.txt"),
        (["URL", "--key-file", "none.key"], "No such file or directory: none.key"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], message: str, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *(argument.replace("URL", server.url) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert message.replace("URL", server.url) in err
    assert err.count("\n") == 1


def test_no_server_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert main(["bench", f"http://127.0.0.1:{free.getsockname()[1]}"]) == 2
    err = capsys.readouterr().err
    assert "no server answers at http://127.0.0.1:" in err
    assert "llamita serve MODEL" in err
    assert err.count("\n") == 1


def test_a_key_file_that_holds_more_is_refused_without_showing_it(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(f"KEY = {SECRET}\n")
    assert main(["bench", server.url, "--key-file", str(tmp_path / "key")]) == 2
    shown = capsys.readouterr()
    assert "must hold an API key alone" in shown.err
    assert SECRET not in shown.err + shown.out


def test_an_earlier_result_is_replaced_only_where_that_was_asked_for(server: ScriptedServer, tmp_path: Path) -> None:
    arguments = ["bench", server.url, "--concurrency", "1", "--requests", "2", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = (tmp_path / "out" / "summary.json").read_bytes()
    assert main(arguments) == 2
    assert (tmp_path / "out" / "summary.json").read_bytes() == before
    assert main([*arguments, "--requests", "3", "--overwrite"]) == 0
    assert read(tmp_path / "out")[0]["loads"][0]["requests"] == 3


def test_ctrl_c_keeps_the_loads_that_are_done(server: ScriptedServer, tmp_path: Path) -> None:
    server.follow(script(lambda seen, number: answer("x", "y", pause=0.0 if number < 7 else 5.0)))
    output = tmp_path / "out"
    command = [sys.executable, "-m", "llamita.cli.main", "bench", server.url, "--concurrency", "1", "2"]
    command += ["--requests", "5", "--warmup", "1", "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    begun = time.monotonic()
    while len(asked(server)) < 9:  # 1 + 5 + 1 warm-up, and two of the second load, which take long
        assert time.monotonic() - begun < 60
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; loads that were not done are left out" in err
    assert "Traceback" not in err
    summary, lines = read(output)
    assert summary["interrupted"] is True
    assert [load["load"]["concurrency"] for load in summary["loads"]] == [1]
    assert len(lines) == 5
    assert "1 at once" in out
