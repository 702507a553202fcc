"""`llamita generate`: continues a prompt with a trained model, printing text as it comes.

Reads the prompt and the options, loads the model and prints. The engine chooses the tokens and decides when generation
ends.
"""

import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO
from unicodedata import category

import tyro

from llamita.backend.sampling_params import SamplingParams
from llamita.cli.loading import LoadConfig
from llamita.inference.llm import LLM
from llamita.inference.request import Statistics
from llamita.progress import ProgressBar
from llamita.text.tokenizer import Tokenizer
from llamita.training import exit_status

if TYPE_CHECKING:
    from llamita.inference.batch import Outcome, Totals
    from llamita.inference.llm import LLM


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a trained model.

    By default tokens are drawn from the model's own distribution (temperature 1, nothing else switched on).
    """

    model: tyro.conf.Positional[Path]
    """A model directory, a training run (then its best checkpoint), a GGUF file, or a name on the hub (owner/name)."""
    prompt: tyro.conf.Positional[str | None] = None
    """The text to continue; - reads it from standard input, and so does a pipe. Left out: a new text is begun."""
    prompt_tokens: tuple[int, ...] = ()
    """The prompt as token ids; no BOS token is put before them."""
    input: Path | None = None
    """A file of prompts: a JSON object a line with prompt, prompt_tokens or messages, an id, sampling parameters."""
    output: Path | None = None
    """The file of answers to --input, a line each as they end; the same command resumes one that was cut off."""
    template: str | None = None
    """The chat template for messages in --input, where the model has none: chatml, r0 or plain."""
    adapter: tuple[str, ...] = ()
    """Adapters to load over the model, NAME=PATH each. One alone serves the prompt; lines of --input name theirs."""
    sampling: SamplingParams = SamplingParams()
    echo: bool = True
    """Print the prompt before its continuation."""
    statistics: bool = False
    """Report tokens per second, memory bandwidth and the seed on standard error."""
    running: LoadConfig = LoadConfig()


def run(config: GenerateConfig) -> int:

    if config.input is not None or config.output is not None:
        return _run_file(config)
    if config.prompt is not None and config.prompt_tokens:
        raise ValueError("both a prompt and --prompt-tokens were given; give one of them")
    prompt: str | tuple[int, ...] = config.prompt_tokens or read_prompt(config.prompt, sys.stdin)
    adapters = named_paths(config.adapter)
    if len(adapters) > 1:
        raise ValueError(f"{len(adapters)} adapters were given for one prompt; give one, or a file with --input")
    options = config.running.arguments()
    with ProgressBar(f"opening {config.model.name}"):  # kernels are compiled the first time
        llm = LLM.load(config.model, adapters=adapters, **options)
    adapter = next(iter(adapters), None)
    if config.sampling.n > 1:
        return _run_several(llm, prompt, adapter, config)
    events = llm.events(prompt, config.sampling, adapter=adapter)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows a question mark
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if config.echo:
        print(prompt if isinstance(prompt, str) else shown(prompt, llm.tokenizer), end="", flush=True)
    shape = harmless if sys.stdout.isatty() else str
    status, last = 0, None
    try:
        for event in events:
            last = event
            if event.finish_reason == "error":
                raise ValueError(event.error)
            print(f" {event.token_id}" if llm.tokenizer is None else shape(event.text), end="", flush=True)
    except KeyboardInterrupt:
        status = exit_status.INTERRUPTED
    print(flush=True)
    if config.statistics and last is not None:
        print(report(last.statistics, last.finish_reason or "interrupted", llm), file=sys.stderr)
    return status


def _run_file(config: GenerateConfig) -> int:
    """Serves all lines of the input that the output lacks; returns the exit status, 1 where one of them failed."""
    from llamita.inference import batch

    source, output = config.input, config.output
    if source is None or output is None:
        raise ValueError("--input and --output go together: a file of prompts, and the file for the answers")
    if config.prompt is not None or config.prompt_tokens:
        raise ValueError("both --input and a prompt were given; give one of them")
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    adapters = named_paths(config.adapter)
    options = config.running.arguments()
    with ProgressBar(f"opening {config.model.name}"):  # kernels are compiled the first time
        llm = LLM.load(config.model, adapters=adapters, **options)
    items = batch.read_items(llm, source, config.sampling, config.template)
    made_from = {
        "model": str(config.model.resolve()) if config.model.exists() else str(config.model),
        "input": batch.digest(source),
        "options": asdict(config.sampling) | {"template": config.template},
    }
    if config.running.own_code is not None:
        made_from["with"] = str(config.running.own_code.resolve())
    if adapters:
        made_from["adapters"] = {name: str(Path(path).resolve()) for name, path in adapters.items()}
    kept, outcomes = batch.run_batch(llm, items, output, made_from)
    if kept:
        print(f"{kept} of {len(items)} are in {output} already", file=sys.stderr)
    try:
        totals, seconds = _with_bar(outcomes, len(items) - kept)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    print(
        f"{totals.requests} requests, {totals.prompt_tokens} prompt tokens and {totals.generated_tokens} generated in "
        f"{seconds:.1f} s, {totals.generated_tokens / seconds:,.1f} tokens/s"
        + (f"; {totals.failed} failed" if totals.failed else ""),
        file=sys.stderr,
    )
    return 1 if totals.failed else 0


def _with_bar(outcomes: Iterator["Outcome"], total: int) -> tuple["Totals", float]:
    """Counts the outcomes, with a progress bar on standard error; returns their totals and the seconds they took."""
    from llamita.inference import batch

    totals, started = batch.Totals(), time.perf_counter()
    with ProgressBar("generating", total, unit="tokens") as bar:
        for number, (item, outcome) in enumerate(outcomes, start=1):
            batch.count(totals, item, outcome)
            bar.update(number, totals.generated_tokens)
    return totals, time.perf_counter() - started


def named_paths(given: tuple[str, ...]) -> dict[str, str]:
    """Returns texts of the form NAME=PATH as a dict; ValueError for another form."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not name or not equals or not path or name in found:
            raise ValueError(f"--adapter {text!r} must have the form NAME=PATH, each name once")
        found[name] = path
    return found


def _run_several(llm: "LLM", prompt: str | tuple[int, ...], adapter: str | None, config: GenerateConfig) -> int:
    """Prints `n` continuations with an empty line between them; returns the exit status."""
    shape = harmless if sys.stdout.isatty() else str
    start = (prompt if isinstance(prompt, str) else shown(prompt, llm.tokenizer)) if config.echo else ""
    found = llm.generate(prompt, config.sampling, adapter=adapter).continuations
    texts = [
        continuation.text if llm.tokenizer else " " + " ".join(map(str, continuation.token_ids))
        for continuation in found
    ]
    print("\n\n".join(start + shape(text) for text in texts), flush=True)
    if config.statistics:
        for continuation in found:
            print(report(continuation.statistics, continuation.finish_reason, llm), file=sys.stderr)
    return 0


def read_prompt(given: str | None, stdin: TextIO) -> str:
    """Returns the prompt as given, or all of standard input, less its last newline, for `-`, a pipe or a file.

    Raises ValueError where standard input is not UTF-8.
    """
    if given is not None and given != "-":
        return given
    if given is None and not _is_fed(stdin):
        return ""
    try:
        text = stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on standard input is not UTF-8 (byte {error.start}); convert it first") from None
    return text.removesuffix("\n").removesuffix("\r")


def shown(token_ids: tuple[int, ...], tokenizer: Tokenizer | None) -> str:
    """Returns token ids as text, or as numbers for a model without a tokenizer."""
    return " ".join(map(str, token_ids)) if tokenizer is None else tokenizer.decode(token_ids)


def harmless(text: str) -> str:
    """Returns the text without control characters but line ends and tabs: a model does not steer the terminal."""
    return "".join("\ufffd" if category(letter) == "Cc" and letter not in "\n\t" else letter for letter in text)


def report(statistics: Statistics, ending: str, llm: "LLM") -> str:
    """Returns the line of `--statistics`.

    Its bandwidth counts the weights, and the cached keys and values, once for every decoded token.
    """
    return (
        f"warm-up: {llm.engine.warm_up_seconds:.2f} s; "
        f"prefill: {statistics.prompt_tokens} tokens in {statistics.prefill_seconds:.3f} s, "
        f"{statistics.prefill_tokens_per_second:.1f} tokens/s; "
        f"decode: {statistics.decode_tokens} tokens in {statistics.decode_seconds:.3f} s, "
        f"{statistics.decode_tokens_per_second:.1f} tokens/s, "
        f"{statistics.decode_bytes_per_second / 1e9:.2f} GB/s read; "
        f"in {llm.runner.dtype_name} ({llm.runner.dtype_reason}), {llm.runner.kernels}; "
        f"{statistics.generated_tokens} generated; seed {statistics.seed}; finished: {ending}"
    )


def _is_fed(stdin: TextIO) -> bool:
    """Returns whether standard input is a pipe or a file rather than a terminal or nothing."""
    try:
        mode = os.fstat(stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed, or replaced by something that is no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
