"""The import rules of the package, read from its source with `ast`: direction, siblings, frameworks, laziness."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "llamita"

# From left to right: a room may import from rooms to its left, never from those beside it or to its right.
ORDER = (
    ("rope", "files", "labels", "optimization", "config_values"),
    ("config",),
    ("presets",),
    ("architecture",),
    ("checkpoint",),
    ("plan", "objective", "adapters"),
    ("packed_step", "token_choice"),
    ("adapter_files",),
    ("text",),
    ("data",),
    ("torch_backend", "mlx_backend"),
    ("training", "inference"),
    ("formats", "evaluation"),
    ("workflows", "server"),
    ("backends",),
    ("library",),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FRAMEWORKS = {"torch": "torch_backend", "mlx": "mlx_backend", "mlx_lm": "mlx_backend"}
# What a user calls first: library is the package's own face, found when asked for; backends chooses a framework, and
# so must not load one before it has chosen.
LAZY_ROOMS = ("cli", "library", "backends")


def faults(module: str, source: str, is_package: bool = False) -> list[str]:
    """What the source of `module` (such as `llamita.data.packing`) imports against the rules; one line each."""
    room = room_of(module)
    if room and room not in RANK:
        return [f"{module}: the room {room!r} has no place in the order of imports"]
    tree = ast.parse(source)
    at_top = {id(node) for node in top_level(tree)}
    found = []
    for node in ast.walk(tree):
        for target in imported(node, module, is_package):
            where = f"{module}:{node.lineno} imports {target}"
            owner = FRAMEWORKS.get(target.split(".")[0])
            if owner and room != owner:
                found.append(f"{where}; only {owner}/ may")
            if target.split(".")[0] != "llamita":
                continue
            other = room_of(target)
            if room == "" and other == "library":
                continue
            if other in RANK and other != room and RANK[other] >= RANK.get(room, -1):
                found.append(f"{where}; {other} is not to the left of {room or 'the package itself'}")
            if other in FRAMEWORKS.values() and room not in (other, *LAZY_ROOMS):
                found.append(f"{where}; a backend is passed in, by {LAZY_ROOMS[0]}/")
            if id(node) not in at_top and room not in LAZY_ROOMS:
                found.append(f"{where} inside a function or class; only {LAZY_ROOMS[0]}/ imports lazily")
        if is_dynamic_import(node) and room not in LAZY_ROOMS:
            found.append(f"{module}:{node.lineno} imports by a computed name; only {LAZY_ROOMS[0]}/ does")
    return found


def room_of(module: str) -> str:
    """`data` of `llamita.data.packing`, empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def top_level(tree: ast.AST) -> list[ast.AST]:
    """Every node outside functions and classes (an `if` or `try` at the top of a module is still the top)."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            found += [node, *top_level(node)]
    return found


def imported(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """The full names of the modules that a node imports; `from llamita import data` counts as `llamita.data`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = module.split(".") if is_package else module.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1]
        base = ".".join([*parts, base] if base else parts)
    return [f"{base}.{alias.name}" for alias in node.names]


def is_dynamic_import(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_of)
def test_a_module_imports_only_from_rooms_to_its_left(path: Path) -> None:
    assert faults(module_of(path), path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("llamita.config", "from llamita.architecture import parameters", "architecture is not to the left of config"),
        ("llamita.data.packing", "import llamita.training.trainer", "training is not to the left of data"),
        ("llamita.data.packing", "from llamita import workflows", "workflows is not to the left of data"),
        ("llamita.data.packing", "from ..inference import engine", "inference is not to the left of data"),
        ("llamita.data", "from ..inference import engine", "inference is not to the left of data"),
        ("llamita.training.trainer", "from llamita.inference import llm", "inference is not to the left of training"),
        ("llamita.inference.llm", "import llamita.training.schedule", "training is not to the left of inference"),
        ("llamita.training.trainer", "from llamita.torch_backend import losses", "a backend is passed in"),
        ("llamita", "from llamita.cli.main import main", "cli is not to the left of the package itself"),
        ("llamita.training.trainer", "import torch.nn as nn", "only torch_backend/ may"),
        ("llamita.cli.train", "def run():\n    import torch", "only torch_backend/ may"),
        ("llamita.torch_backend.model", "from mlx import core", "only mlx_backend/ may"),
        ("llamita.data.shards", "def f():\n    from llamita.text import bpe", "inside a function or class"),
        ("llamita.data.shards", "class A:\n    from llamita.text import bpe", "inside a function or class"),
        ("llamita.data.shards", "f = lambda: __import__('torch')", "imports by a computed name"),
        ("llamita.data.shards", "import importlib as i\ni.import_module('json')", "imports by a computed name"),
        ("llamita.attic.things", "import json", "has no place in the order"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(module: str, source: str, expected: str) -> None:
    found = faults(module, source, is_package=module in ("llamita", "llamita.data"))
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llamita.torch_backend.layers", "from torch import nn\nfrom llamita.torch_backend import losses"),
        ("llamita.cli.train", "def run():\n    from llamita.torch_backend.train_step import TorchTrainStep"),
        ("llamita.training.trainer", "def draw():\n    import matplotlib.pyplot"),
        ("llamita.text.tokenizer", "try:\n    from llamita import checkpoint\nexcept ImportError:\n    raise"),
        ("llamita.workflows.quickstart", "from llamita.training import trainer\nfrom llamita.inference import llm"),
    ],
)  # fmt: skip
def test_what_the_rules_allow_is_not_reported(module: str, source: str) -> None:
    assert faults(module, source) == []


def test_the_command_loads_no_framework_before_a_verb_is_chosen() -> None:
    code = (
        "import sys; from llamita.cli.main import main; assert main(['--help']) == 0\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))\n"
        "print('OURS', *sorted(name for name in sys.modules if name.startswith('llamita')))\n"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    loaded, ours = set(lines[-2].split()[1:]), lines[-1].split()[1:]
    heavy = {"torch", "mlx", "numpy", "transformers", "tokenizers", "matplotlib", "tyro", "rich", "huggingface_hub"}
    assert loaded & heavy == set()
    assert ours == ["llamita", "llamita.cli", "llamita.cli.main"]


def test_one_backend_may_not_import_the_other() -> None:
    found = faults("llamita.mlx_backend.model", "import llamita.torch_backend.model")
    assert any("torch_backend is not to the left of mlx_backend" in fault for fault in found)
