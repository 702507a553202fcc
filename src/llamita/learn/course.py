"""The folder that a reader works in: begun from a track, with a small trained model and what it should compute."""

import contextlib
import io
import json
import re
import tempfile
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llamita.data import meadow
from llamita.data.prepare import PrepareConfig, prepare
from llamita.learn import links
from llamita.learn import track as tracks
from llamita.learn.figures import LINE, divided, drawn
from llamita.learn.track import Lesson, Track
from llamita.storage.files import atomic_directory
from llamita.storage.formats.checkpoints import to_training_checkpoint
from llamita.text.bpe import train_bpe_from_iterator
from llamita.training.run_directory import LAST
from llamita.workflows.convert import ConvertConfig, Tools, convert, read_model
from llamita.workflows.pretrain import pretrain
from llamita.workflows.quickstart import QuickstartConfig, training_options

COURSE_FILE = "course.json"
MODEL_FILE = "stories.pt"
MODEL_DIRECTORY = "model"
SANITY_FILE = "sanity_check.npz"
LESSONS = "lessons"


@dataclass(frozen=True)
class Course:
    """A started folder."""

    directory: Path
    track: Track
    framework: str


def start(directory: Path, track: Track, framework: str, model: Path | None, steps: int, tools: Tools) -> Course:
    """Writes a course folder: skeletons, lessons, a model with its tokenizer, and logits to compare with.

    The model is a copy of `model`, of any kind that `llamita convert` reads, or one that is trained here on Meadow's
    stories for so many steps. FileExistsError where the directory exists; ValueError for a model that the course's
    Llama cannot hold, and for a model where the track has none.
    """
    files = track.skeletons(framework)
    if steps < 1:
        raise ValueError(f"model_steps={steps} must be at least 1")
    if model is not None and track.model == "none":
        raise ValueError(f"{track.name} needs no model; leave --model out")
    with atomic_directory(directory) as folder:
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
        (folder / LESSONS).mkdir()
        for number, lesson in enumerate(track.lessons, 1):
            text = links.led(lesson.text, lambda found: found.uri)
            (folder / LESSONS / f"{number}-{lesson.name}.md").write_text(text, "utf-8")
        for name, figure in drawn(track).items():
            (folder / LESSONS / f"{name}.svg").write_text(figure, "utf-8")
        (folder / COURSE_FILE).write_text(json.dumps({"track": track.name, "framework": framework}) + "\n", "utf-8")
        if model is not None:
            _write_model(folder, model, track, tools)
        elif track.model != "none":
            with tempfile.TemporaryDirectory(prefix="llamita-learn-") as temporary:
                _write_model(folder, _trained(Path(temporary), steps, tools), track, tools)
    return Course(directory, track, framework)


def opened(directory: Path) -> Course:
    """Returns the course that was started in a directory; ValueError where there is none."""
    path = directory / COURSE_FILE
    if not path.is_file():
        raise ValueError(f"{directory} is no course: it has no {COURSE_FILE}; llamita learn start DIR begins one")
    try:
        content = json.loads(path.read_text("utf-8"))
        track, framework = tracks.find(content["track"]), content["framework"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected {{"track": ..., "framework": ...}}: {error}') from None
    track.solutions(framework)  # refuses a framework that there is not
    return Course(directory, track, framework)


def as_printed(course: Course, lesson: Lesson) -> str:
    """Returns a lesson's text for a terminal.

    A figure is its caption and the path of its file, where that is there. Links are their words; files and lines of
    what they lead to stand below their paragraph.
    """

    def said(line: re.Match[str]) -> str:
        path = course.directory / LESSONS / f"{line['name']}.svg"
        caption = textwrap.fill(f"[Figure: {line['caption']}", 120)
        return caption + (f"\n {path}]" if path.is_file() else "]")

    parts = []
    for text, definitions in links.divided(LINE.sub(said, lesson.text)):
        if not definitions:
            parts.append(text)
            continue
        before, gap, paragraph = text.rpartition("\n\n")
        words = links.LINK.sub(r"\g<text>", paragraph)
        parts += [before, gap, textwrap.fill(words, 120, break_long_words=False, break_on_hyphens=False), "\n"]
        width = max(len(found.name) for found in definitions)
        parts += [f"  {found.name:<{width}}  {found.path}:{found.lines[0]}\n" for found in definitions]
    return "".join(parts)


def figures(course: Course) -> dict[str, str]:
    """Returns the SVG of each figure by its name: as it lies in the folder, drawn where one is missing."""
    names = [name for lesson in course.track.lessons for _, _, name in divided(lesson.text) if name]
    paths = {name: course.directory / LESSONS / f"{name}.svg" for name in names}
    if all(path.is_file() for path in paths.values()):
        return {name: path.read_text("utf-8") for name, path in paths.items()}
    return drawn(course.track)


def _trained(directory: Path, steps: int, tools: Tools) -> Path:
    """Trains quickstart's small model on Meadow for a few steps and returns its directory; seconds to a minute."""
    tokenizer, data, run = directory / "tokenizer", directory / "data", directory / "run"
    config = QuickstartConfig(output=directory, size="small", steps=steps, stories=1600).resolved()
    texts = meadow.corpus(config.seed, 1000, "train")
    with contextlib.redirect_stdout(io.StringIO()):  # what training reports is no part of this
        train_bpe_from_iterator((f"{text}\n" for text in texts), config.vocab_size).save(tokenizer)
        prepare(PrepareConfig(output=data, tokenizer=tokenizer, source="meadow", documents=config.stories))
        result = pretrain(training_options(config, data, run), tools.backend)
    if result.interrupted:
        raise KeyboardInterrupt
    return run / LAST


def _write_model(folder: Path, source: Path, track: Track, tools: Tools) -> None:
    """Writes a model as the course reads it, its tokenizer, and its logits and last hidden states on fixed tokens."""
    if track.model == "directory":
        convert(source, folder / MODEL_DIRECTORY, ConvertConfig(), tools)
        return
    _, model = read_model(source, ConvertConfig(), tools)
    plain = replace(
        model, config=replace(model.config, rope_theta=10000.0)
    )  # all that the original course's form holds
    checkpoint = to_training_checkpoint(plain, "course")
    if model.config.rope_theta != plain.config.rope_theta:
        checkpoint["model_args"]["rope_theta"] = model.config.rope_theta  # the LlamaConfig of this folder has it
    tools.write_pickle(folder / MODEL_FILE, checkpoint)
    if model.tokenizer is not None:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            model.tokenizer.save(temporary)
            for name in ("tokenizer.json", "tokenizer.model"):
                if (Path(temporary) / name).is_file():
                    (Path(temporary) / name).rename(folder / name)
    length = min(8, model.config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=(2, length))
    found = tools.backend.runner_over(model.config, model.arrays).forward(tokens, capture=("norm",))
    np.savez(folder / SANITY_FILE, tokens=tokens, logits=found["logits"][:, -1:], hidden_states=found["norm"])
