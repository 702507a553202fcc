"""`llamita evaluate`: measures a model in one of four ways; the metrics are recorded in the run that it belongs to."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from llamita.backend.interface import BackendName, Runner

TASKS = ("perplexity", "meadow", "multiple-choice")
HARNESS = "lm-eval:"
SCORED_STORIES = 1000


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model: its loss over prepared text, the stories it writes, multiple choice, or a task of lm_eval.

    perplexity: nats per token, perplexity, nats per character and bits per byte over --data, prepared text.
    meadow: stories of the embedded world, predicted and written.
    multiple-choice: questions of --data, JSON lines with "question" or "context", "choices" and "answer".
    lm-eval:NAME: a task of the package lm_eval; --data is a directory of task files of your own.
    """

    model: tyro.conf.Positional[Path]
    """A model directory, a training run (then its best checkpoint), a GGUF file, or a name on the hub (owner/name)."""
    data: Path | None = None
    """The data to measure on; see the tasks."""
    task: str = "perplexity"
    """perplexity, meadow, multiple-choice, or lm-eval:NAME (lm-eval:NAME,NAME for several)."""
    split: Literal["train", "validation"] = "validation"
    """perplexity: the part of the data to measure on."""
    sequence_length: int = 0
    """perplexity: length of a window in tokens; 0: as many as the model has positions."""
    stride: int = 0
    """perplexity: tokens by which the window moves; fewer give each target more context. 0: the sequence length."""
    within_documents: bool = False
    """perplexity: predict each document from its own beginning, as in training with one document a row."""
    limit: int = 0
    """Most questions to ask, or number of stories to predict and to write; 0: all questions, or a thousand stories."""
    few_shot: int | None = None
    """lm-eval: solved examples before each question. Left out: as many as the task says."""
    max_tokens: int = 0
    """lm-eval: most tokens to generate; 0: as many as the task says."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin each question with the token that begins a text. auto: where the tokenizer has one; with lm-eval, where the
    tokenizer's files ask transformers for it."""
    seed: int = 0
    """meadow: chooses the stories."""
    name: str = ""
    """Name of the record of the metrics in RUN/evaluations. Left out: the task and the data."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights, and of the activations beside quantised ones; auto: that of the file."""
    backend: BackendName = "auto"
    """The framework that computes; auto: MLX on Apple silicon where it is installed, else PyTorch."""
    device: str = "auto"
    """cpu or cuda with PyTorch, cpu or gpu with MLX; auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.task not in TASKS and not self.task.removeprefix(HARNESS).strip(", ").strip():
            raise ValueError(f"task={self.task!r} names no task of lm_eval; give one, as in {HARNESS}hellaswag")
        if self.task not in TASKS and not self.task.startswith(HARNESS):
            raise ValueError(f"task={self.task!r} is unknown; choose from {', '.join(TASKS)}, {HARNESS}NAME")
        for name in ("limit", "max_tokens", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.data is None and self.task in ("perplexity", "multiple-choice"):
            what = "prepared text (llamita prepare)" if self.task == "perplexity" else "a file of questions"
            raise ValueError(f"--data is missing: {self.task} needs {what}")


def run(config: EvaluateConfig) -> int:
    from llamita.evaluation import records
    from llamita.training.record import command_line

    measure = {"perplexity": _perplexity, "meadow": _meadow, "multiple-choice": _multiple_choice}
    found = measure.get(config.task, _harness)(config)
    for name, metrics in found.items():
        _show(name, metrics)
        run_directory = records.run_of(config.model)
        if run_directory is not None:
            label = "-".join(filter(None, (config.name, name if len(found) > 1 or not config.name else "")))
            try:
                file = records.write(run_directory, label, metrics, command_line(sys.argv), _model(config.model))
            except OSError as error:
                print(f"note: the metrics could not be recorded in {run_directory}: {error}", file=sys.stderr)
            else:
                print(f"recorded in {file}")
    return 0


def _perplexity(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    import numpy as np

    from llamita.data.shards import TokenShards
    from llamita.evaluation.perplexity import strided_perplexity
    from llamita.storage import model_directory, peft_directory
    from llamita.text.tokenizer import Tokenizer

    assert config.data is not None
    directory = _model(config.model)
    positions = model_directory.load_config(
        peft_directory.place_of(directory, peft_directory.CONFIG)
    ).max_position_embeddings
    length = config.sequence_length or positions
    stride = config.stride or length
    if not 1 <= length <= positions:
        raise ValueError(f"sequence_length={length} must be 1 to {positions}, the model's positions")
    if not 1 <= stride <= length:
        raise ValueError(f"stride={stride} must be 1 to sequence_length={length}")
    shards = TokenShards(config.data, config.split)
    vocabulary = peft_directory.place_of(directory, *peft_directory.VOCABULARY)
    if Tokenizer.load(vocabulary).hash != shards.manifest.tokenizer_hash:
        raise ValueError(
            f"{config.data} was prepared with another tokenizer than {directory} has; prepare the text again with "
            f"--tokenizer {vocabulary}"
        )
    runner = _runner(config)
    documents = [shards.document(i) for i in range(shards.num_documents)]
    text = documents if config.within_documents else np.concatenate(documents)
    result = strided_perplexity(
        runner, text, runner.config.vocab_size, length, stride, shards.num_characters, shards.num_bytes
    )
    over = f"{config.data.name} {config.split}"
    over = f"{over} documents" if config.within_documents else over
    return {
        f"perplexity {over}": {
            "nats_per_token": result.nats_per_token,
            "perplexity": result.perplexity,
            "nats_per_character": result.nats_per_character,
            "bits_per_byte": result.bits_per_byte,
            "targets": result.targets,
            "window": length,
            "stride": stride,
            **({"documents": len(documents)} if config.within_documents else {}),
        }
    }


def _meadow(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    from dataclasses import asdict

    from rich.console import Console

    from llamita.data import meadow
    from llamita.workflows import quickstart

    settings = quickstart.QuickstartConfig(scored_stories=config.limit or SCORED_STORIES, seed=config.seed)
    floor = meadow.floor(meadow.corpus(config.seed, settings.scored_stories, "validation"))
    report = quickstart.evaluate(settings, _model(config.model), _runner(config), floor, Console(stderr=True))
    return {"meadow": asdict(report)}


def _multiple_choice(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    from llamita.evaluation import multiple_choice
    from llamita.storage import peft_directory
    from llamita.text.tokenizer import Tokenizer

    assert config.data is not None
    questions = multiple_choice.read_questions(config.data, config.limit)
    directory = _model(config.model)
    tokenizer = Tokenizer.load(peft_directory.place_of(directory, *peft_directory.VOCABULARY))
    if config.bos == "always" and tokenizer.bos_id is None:
        raise ValueError(f"bos=always: the tokenizer of {directory} has no token that begins a text")
    bos = config.bos == "always" or (config.bos == "auto" and tokenizer.begins_texts)
    runner = _runner(config)
    result = multiple_choice.evaluate(
        runner,
        lambda text: tokenizer.encode(text, bos=bos),
        questions,
        runner.config.vocab_size,
        runner.config.max_position_embeddings,
    )
    return {f"multiple-choice {config.data.stem}": result.metrics()}


def _harness(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    import llamita
    from llamita.evaluation import lm_eval_adapter

    names = [name.strip() for name in config.task.removeprefix(HARNESS).split(",") if name.strip()]
    llm = llamita.load(_model(config.model), dtype=config.dtype, backend=config.backend, device=config.device)
    add_bos = {"auto": None, "always": True, "never": False}[config.bos]
    model = lm_eval_adapter.LlamitaLM(llm, add_bos)
    more = {"gen_kwargs": {"max_gen_toks": config.max_tokens}} if config.max_tokens else {}
    results = lm_eval_adapter.run(
        model, names, config.data, num_fewshot=config.few_shot, limit=config.limit or None, **more
    )
    return {f"{HARNESS}{task}": values for task, values in lm_eval_adapter.metrics_by_task(results).items()}


def _runner(config: EvaluateConfig) -> Runner:
    """Returns the model, loaded as the options say."""
    from llamita.backend.choice import load_backend

    backend = load_backend(config.backend, device=config.device)
    return backend.load_runner(_model(config.model), config.dtype, config.device)


def _model(model: Path) -> Path:
    from llamita.storage import model_directory

    return model_directory.resolve_model_directory(model)


def _show(name: str, metrics: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llamita.evaluation.records import with_errors

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    for key, value, error in with_errors(metrics):
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        table.add_row(f"  {key.replace('_', ' ')}", shown + (f" ± {error:.4f}" if error is not None else ""))
    console = Console(highlight=False, markup=False)
    console.print(name, style="bold")
    console.print(table)
