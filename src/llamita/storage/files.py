"""Files that exist whole or not at all, and JSON that is checked as it is read."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 30_000_000  # several times the largest header, index or config of real models


@contextlib.contextmanager
def atomic_directory(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block ends, and vanishes when it raises.

    An existing `path` raises FileExistsError before anything is written, unless `overwrite`.
    """
    path = _destination(path, overwrite)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        move_into_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def move_into_place(temporary: Path, path: Path) -> None:
    """Give a whole directory the name `path`, in place of what has it, once the disk holds all of it."""
    for file in temporary.rglob("*"):
        if file.is_file():
            _sync(file)
    _sync(temporary)
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.rename(path, old / path.name)
        os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, path)
    _sync(path.parent)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Replace a file by new content in one step: a reader sees the old content or the new, never a part."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_file(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling that becomes the file `path` when the block ends, and vanishes when it raises.

    An existing `path` raises FileExistsError before anything is written, unless `overwrite`.
    """
    path = _destination(path, overwrite)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _destination(path: Path | str, overwrite: bool) -> Path:
    """The path, its parent directories made; FileExistsError where it exists and may not be replaced."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; choose another name, or overwrite it explicitly")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def combined_sha256(hashes: Iterable[str], beginning: str = "") -> str:
    """One hash over the hashes of several files, and over a text before them."""
    total = hashlib.sha256(beginning.encode())
    for digest in hashes:
        total.update(bytes.fromhex(digest))
    return total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; one line of error where it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face model directory")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; a file of settings is smaller than {MAX_JSON_BYTES}")
    value = parse_json(path.read_bytes(), f"{path} is not valid JSON")
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def parse_json(content: bytes, complaint: str) -> Any:
    """The value of a JSON text, no key of an object twice; ValueError with the complaint where it is broken."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"it has {key!r} twice")
            result[key] = value
        return result

    try:
        return json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{complaint} ({error}); fetch or write the file again") from None
