"""A training run on disk: its lock, its manifest, its checkpoints, and the links to the last and the best of them.

    RUN/run.json               what the run is: model, data, training, compared when it is resumed; its sessions
    RUN/checkpoints/step-00000100/   a Hugging Face model directory + optimizer.safetensors + train_state.json
                               (of an adapter: PEFT's files in place of the model's; of processes that divide the
                               weights between them: shards/ in place of the arrays, until they are put together)
    RUN/last, RUN/best         relative links into checkpoints/
    RUN/autopsies/step-00000123/   report.json and report.md about an update that went wrong
    RUN/metrics.jsonl, loss.png, samples.txt    written by others

A checkpoint exists whole or not at all, and its state holds the hashes of its files, so a damaged one is found and
passed over. Knows nothing of frameworks or of how a run goes on.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from llamita.backend.group import ALONE, Group
from llamita.backend.muon import MuonSettings
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.storage import files, locks, model_directory
from llamita.training import record

FORMAT = 1
MANIFEST, STATE = "run.json", "train_state.json"
AUTOPSIES = "autopsies"
LAST, BEST = "last", "best"
LOCK = ".lock"
LATER_OPTIONS = {"training.optimizer": "adamw"} | {f"training.{key}": on for key, on in asdict(MuonSettings()).items()}
"""Keys of an identity that older versions did not write, with what stands for that."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have the hashes that its state records; arrays are mapped, not read.

    Where several processes wrote it in parts, there are no arrays, and `shards` is the directory of the parts.
    """

    step: int
    path: Path
    state: Mapping[str, Any]
    weights: Mapping[str, HostArray]
    optimizer: Mapping[str, HostArray]
    shards: Path | None = None


class WeightFiles(Protocol):
    """Writes the weights of a checkpoint as files into its directory, and reads them there again."""

    def save(self, directory: Path, config: ModelConfig, weights: Mapping[str, HostArray]) -> None: ...
    def load(self, directory: Path) -> dict[str, HostArray]: ...


class ModelFiles:
    """A Hugging Face model directory."""

    def save(self, directory: Path, config: ModelConfig, weights: Mapping[str, HostArray]) -> None:
        model_directory.save_config(directory, config)
        model_directory.save_tensors(directory, weights)

    def load(self, directory: Path) -> dict[str, HostArray]:
        return model_directory.load_tensors(directory)


class RunDirectory:
    """The directory of one run, held by one process at a time, or by one group of them. Made by `open_run`.

    The first process of the group alone writes; what changes the manifest does so in the memory of the others.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], weight_files: WeightFiles | None = None, group: Group = ALONE
    ) -> None:
        self.path = path
        self.group = group
        self.writes = group.rank == 0
        self.weight_files = weight_files or ModelFiles()
        self.manifest = manifest
        self.checkpoints = path / "checkpoints"

    def file(self, name: str) -> Path:
        return self.path / name

    def update_manifest(self, changes: Mapping[str, Any]) -> None:
        self.manifest |= changes
        if self.writes:
            files.atomic_write(self.file(MANIFEST), json.dumps(self.manifest, indent=2, sort_keys=True) + "\n")

    def update_session(self, changes: Mapping[str, Any]) -> None:
        """Add to what run.json says of the session that goes on: the last of its list."""
        sessions = self.manifest["sessions"]
        self.update_manifest({"sessions": [*sessions[:-1], sessions[-1] | changes]})

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, damaged or not, in order."""
        if not self.checkpoints.is_dir():
            return []
        names = [entry.name for entry in self.checkpoints.iterdir() if entry.name.startswith("step-")]
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    def save(
        self,
        step: int,
        config: ModelConfig,
        weights: Mapping[str, HostArray],
        optimizer: Mapping[str, HostArray],
        state: Mapping[str, Any],
        tokenizer_directory: Path | None = None,
    ) -> Path:
        """Write a checkpoint and point `last` at it; OSError, in one line, where the disk refuses."""
        path = self.checkpoint_path(step)
        with self._written(step), files.atomic_directory(path, overwrite=True) as directory:
            if tokenizer_directory is not None:
                shutil.copytree(tokenizer_directory, directory, dirs_exist_ok=True)
            self.weight_files.save(directory, config, weights)
            model_directory.save_tensors(directory, optimizer, name="optimizer")
            _write_state(directory, step, state)
        return path

    def begin_shards(self, step: int) -> Path:
        """Returns an empty directory into which all processes write the parts of a checkpoint."""
        directory = self._unfinished(step)
        if directory.exists():
            shutil.rmtree(directory)
        (directory / model_directory.SHARDS).mkdir(parents=True)
        return directory / model_directory.SHARDS

    def finish_shards(
        self, step: int, config: ModelConfig, state: Mapping[str, Any], tokenizer_directory: Path | None = None
    ) -> Path:
        """Make a checkpoint of the parts that all processes have written, and point `last` at it."""
        directory, path = self._unfinished(step), self.checkpoint_path(step)
        with self._written(step):
            if tokenizer_directory is not None:
                shutil.copytree(tokenizer_directory, directory, dirs_exist_ok=True)
            model_directory.save_config(directory, config)
            _write_state(directory, step, state)
            files.move_into_place(directory, path)
        return path

    def put_together(
        self, saved: Checkpoint, weights: Mapping[str, HostArray], optimizer: Mapping[str, HostArray]
    ) -> None:
        """Write the arrays of a checkpoint in parts as whole ones, in its place."""
        with files.atomic_directory(saved.path, overwrite=True) as directory:
            left_aside = shutil.ignore_patterns(model_directory.SHARDS, STATE)
            shutil.copytree(saved.path, directory, ignore=left_aside, dirs_exist_ok=True)
            model_directory.save_tensors(directory, weights)
            model_directory.save_tensors(directory, optimizer, name="optimizer")
            state = {key: value for key, value in saved.state.items() if key not in ("format", "step", "files")}
            _write_state(directory, saved.step, state)

    def _unfinished(self, step: int) -> Path:
        return self.checkpoints / f".{self.checkpoint_path(step).name}.tmp"

    @contextlib.contextmanager
    def _written(self, step: int) -> Iterator[None]:
        """Points `last` at the checkpoint that the block writes; an OSError says in one line what is left to do."""
        try:
            yield
            self.link(LAST, step)
        except OSError as error:
            raise OSError(
                f"checkpoint {self.checkpoint_path(step).name} could not be written: {error.strerror or error}; "
                "earlier checkpoints are intact: make room, then go on with --resume"
            ) from error

    def link(self, name: str, step: int) -> None:
        """Point RUN/`name` at the checkpoint of `step`, in one move."""
        temporary = self.file(f".{name}.link")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.checkpoint_path(step).relative_to(self.path))
        os.replace(temporary, self.file(name))

    def update_state(self, step: int, changes: Mapping[str, Any]) -> None:
        """Change what the checkpoint of `step` says of the run, in one move; its other files stay as they are."""
        file = self.checkpoint_path(step) / STATE
        content = files.read_json(file) | dict(changes)
        files.atomic_write(file, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def write_autopsy(self, step: int, report: Mapping[str, Any], text: str) -> Path:
        """Write what is known of an update that went wrong, in place of an earlier report of that step."""
        path = self.file(AUTOPSIES) / f"step-{step:08d}"
        with files.atomic_directory(path, overwrite=True) as directory:
            (directory / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", "utf-8")
            (directory / "report.md").write_text(text, "utf-8")
        return path

    def autopsies(self) -> list[Path]:
        """Returns the directories of the autopsies, by step."""
        return sorted(self.file(AUTOPSIES).glob("step-*"))

    def relink(self, last: int, best: int | None) -> None:
        """Point both links where a resumed run stands; a kill or a damaged checkpoint may have left them elsewhere."""
        self.link(LAST, last)
        if best is not None and self.checkpoint_path(best).is_dir():  # a better one may have taken its place since
            self.link(BEST, best)
        else:
            self.file(BEST).unlink(missing_ok=True)

    def prune(self, keep: int, best_step: int | None, keep_every: int = 0) -> None:
        """Delete checkpoints but the newest `keep`, the best, and those of every `keep_every` updates (0: none)."""
        steps = self.steps()
        for step in steps[: max(0, len(steps) - keep)]:
            if step != best_step and not (keep_every and step % keep_every == 0):
                shutil.rmtree(self.checkpoint_path(step))

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints after `step`, the newest first, so that a kill leaves no gap."""
        for later in reversed(self.steps()):
            if later > step:
                shutil.rmtree(self.checkpoint_path(later))

    def newest(self, report: Callable[[str], None], at_most: int | None = None) -> Checkpoint | None:
        """The newest intact checkpoint, or None where the run has written none; damaged ones are reported.

        `at_most` leaves later steps aside. ValueError where there are checkpoints and all of them are damaged.
        """
        steps = [step for step in self.steps() if at_most is None or step <= at_most]
        for step in reversed(steps):
            try:
                return self.load(step)
            except (ValueError, OSError) as error:
                report(f"checkpoint step-{step:08d} is damaged and passed over: {error}")
        if steps:
            raise ValueError(f"every checkpoint in {self.checkpoints} is damaged; start again in another --output")
        return None

    def load(self, step: int, verify: bool = True) -> Checkpoint:
        """Returns a checkpoint; ValueError where it is damaged, as the hashes of its files say if `verify`."""
        path = self.checkpoint_path(step)
        state = files.read_json(path / STATE)
        if state.get("format") != FORMAT:
            raise ValueError(f"{STATE} has format {state.get('format')!r}, this version reads {FORMAT}")
        for name, digest in state["files"].items() if verify else ():
            if not (path / name).is_file():
                raise ValueError(f"{name} is missing")
            if files.sha256(path / name) != digest:
                raise ValueError(f"{name} is not what was written (its SHA-256 differs)")
        if (path / model_directory.SHARDS).is_dir():
            return Checkpoint(step, path, state, {}, {}, path / model_directory.SHARDS)
        optimizer = model_directory.load_tensors(path, name="optimizer")
        return Checkpoint(step, path, state, self.weight_files.load(path), optimizer)


@contextlib.contextmanager
def open_run(
    path: Path | str,
    identity: Mapping[str, Any],
    arguments: Mapping[str, Any],
    resume: bool,
    weight_files: WeightFiles | None = None,
    group: Group = ALONE,
) -> Iterator[RunDirectory]:
    """Hold a run's directory for this process or its group: a new one, or with `resume` one of the same identity.

    `identity` is a nested, JSON-able dict of all that decides the run's result; `arguments` is what to take over when
    it is resumed. ValueError: another process holds it, there is a run already, or nothing to resume, or the identity
    differs (each differing key is named). Nothing is written before these checks.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        held: list[RunDirectory] = []

        def hold() -> dict[str, Any]:
            run = stack.enter_context(_held_run(path, identity, arguments, resume, weight_files, group))
            held.append(run)
            return run.manifest

        manifest = group.first(hold)
        yield held[0] if held else RunDirectory(path, manifest, weight_files, group)


@contextlib.contextmanager
def _held_run(
    path: Path,
    identity: Mapping[str, Any],
    arguments: Mapping[str, Any],
    resume: bool,
    weight_files: WeightFiles | None,
    group: Group,
) -> Iterator[RunDirectory]:
    identity = json.loads(json.dumps(identity))
    check(path, resume)
    check_identity(path, identity, resume)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        check(path, resume)  # again, now that nobody else can begin one
        manifest = read_manifest(path) if resume else {}  # another process may have gone on with it since
        run = RunDirectory(path, manifest, weight_files, group)
        _remove_leftovers(path)
        # The manifest comes first: a directory without one is no run, and would be refused from then on.
        sessions = [*manifest.get("sessions", []), record.session()]
        content = {"format": FORMAT, "identity": identity, "arguments": dict(arguments), "sessions": sessions}
        run.update_manifest(content)
        run.checkpoints.mkdir(exist_ok=True)
        _remove_leftovers(run.checkpoints)
        with _ending(run):
            yield run


@contextlib.contextmanager
def _ending(run: RunDirectory) -> Iterator[None]:
    """Write down how the session ends; one that ends otherwise than by its own code stays `running` there."""
    try:
        yield
    except GeneratorExit:  # nobody left the block: the process is about to end
        raise
    except BaseException as error:
        state = record.INTERRUPTED if isinstance(error, KeyboardInterrupt) else record.FAILED
        with contextlib.suppress(OSError):  # on a full disk the first error is the one to tell
            run.update_session(record.ended(state, error))
        raise
    if run.manifest["sessions"][-1]["state"] == record.RUNNING:  # the trainer may have said something else
        run.update_session(record.ended(record.FINISHED))


def check(path: Path, resume: bool) -> None:
    """Raise ValueError or FileNotFoundError where `path` cannot become, or with `resume` is not, a run directory."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; --output must name a directory")
    begun = (path / MANIFEST).is_file()
    if begun and not resume:
        raise ValueError(f"{path} holds a training run already; add --resume to go on, or choose another --output")
    if resume and not begun:
        raise FileNotFoundError(f"{path} holds no training run to resume; leave --resume out to begin one")
    if not begun and path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise ValueError(f"{path} is not empty and holds no training run; choose another --output")


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The content of RUN/run.json: `identity`, `arguments`, `conditions`."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no training run ({MANIFEST} is missing)")
    manifest = files.read_json(file)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} has format {manifest.get('format')!r}, this version reads {FORMAT}")
    return manifest


def check_identity(path: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Raise ValueError, naming every difference, where a run that is resumed was begun with another identity."""
    if resume:
        compare(read_manifest(path)["identity"], identity)


def compare(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError naming every key in which two identities differ.

    A key that the saved one lacks, as one of an older version may, makes no difference where it is off: 0, false, "".
    """
    before, now = flatten(saved), flatten(json.loads(json.dumps(given)))
    before = {key: value for key, value in LATER_OPTIONS.items() if key in now} | before
    if "model" in saved:  # by an older version perhaps, which did not have every field
        known = {field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING}
        defaults = flatten(json.loads(json.dumps({"model": known})))
        before = {key: value for key, value in defaults.items() if key in now} | before
    faults = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and (key in before or now[key])
    ]
    if not faults:
        return
    hint = "start a new run in another --output for that"
    if any(fault.startswith("training.steps ") for fault in faults):
        hint = "the schedule follows from the steps, and only schedule=constant can be extended; " + hint
    raise ValueError(f"this run cannot be resumed so: {'; '.join(faults)}; {hint}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys joined by dots."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flatten(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _remove_leftovers(directory: Path) -> None:
    """Delete what a killed process left half-written; only for who holds the lock."""
    for entry in directory.iterdir():
        if entry.name.startswith(".") and entry.name.endswith((".tmp", ".old", ".link")):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _write_state(directory: Path, step: int, state: Mapping[str, Any]) -> None:
    content = {"format": FORMAT, "step": step, **state, "files": _hashes(directory)}
    (directory / STATE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _hashes(directory: Path) -> dict[str, str]:
    found = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): files.sha256(file) for file in found}


# --- the lock --------------------------------------------------------------------------------------------------------


def _locked(path: Path) -> contextlib.AbstractContextManager[None]:
    """Holds RUN/.lock; ValueError, naming the process, where another one does."""

    def refusal(holder: str) -> str:
        return (
            f"{path} is in use by another training run (process {holder}); wait for it to end, or choose another "
            "--output"
        )

    return locks.held(path / LOCK, refusal)


def is_running(path: Path) -> bool:
    """Returns whether a process trains in this directory now; asking takes no right to write."""
    return locks.is_held(path / LOCK)
