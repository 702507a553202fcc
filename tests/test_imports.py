"""The import rules of the package, read from its source with `ast`: direction, frameworks, laziness."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "llamita"
COURSES = PACKAGE / "learn" / "tracks"
"""Data of the package: files for a reader's folder, and checks of them. They run in a process of the reader's."""

# From top to bottom: a room may import from rooms above it, never from those beside it or below. The longest name that
# a module's own begins with is its room.
ORDER = (
    ("model", "progress"),
    ("storage",),
    ("text",),
    ("storage.formats",),
    ("data",),
    ("backend",),
    ("backend.torch", "backend.mlx"),
    ("training", "inference"),
    ("evaluation",),
    ("workflows",),
    ("server", "learn"),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FRAMEWORKS = {"torch": "backend.torch", "mlx": "backend.mlx", "mlx_lm": "backend.mlx"}
LAZY_ROOMS = ("cli", "")
LAZY_MODULES = (
    "llamita.learn.harness",
    *("llamita.backend.choice", "llamita.backend.torch.devices", "llamita.backend.torch.infer.kernels.choice"),
    "llamita.backend.torch.train.step",
)
"""What a user calls first loads no framework before it has to: verbs, the package's own face, and the choice of a
backend, which imports the one chosen. Triton is imported where there is a GPU, Numba where kernels of it are wanted,
torch.distributed where several processes train. The harness executes a course's files under the names they import."""


def faults(module: str, source: str, is_package: bool = False) -> list[str]:
    """What the source of `module` (such as `llamita.data.packing`) imports against the rules; one line each."""
    room = room_of(module)
    if room and room not in RANK:
        return [f"{module}: the room {room!r} has no place in the order of imports"]
    tree = ast.parse(source)
    at_top = {id(node) for node in top_level(tree)}
    lazy = room in LAZY_ROOMS or module in LAZY_MODULES
    found = []
    for node in ast.walk(tree):
        for target in imported(node, module, is_package):
            where = f"{module}:{node.lineno} imports {target}"
            owner = FRAMEWORKS.get(target.split(".")[0])
            if owner and room != owner:
                found.append(f"{where}; only {owner} may")
            if target.split(".")[0] != "llamita":
                continue
            other = room_of(target)
            if other in RANK and other != room and RANK[other] >= RANK.get(room, len(ORDER)):
                found.append(f"{where}; {other} is not above {room}")
            if other in FRAMEWORKS.values() and other != room and room != LAZY_ROOMS[0]:
                found.append(f"{where}; a backend is passed in, or chosen by {LAZY_MODULES[0]}")
            if id(node) not in at_top and not lazy:
                found.append(f"{where} inside a function or class; only {LAZY_ROOMS[0]}/ imports lazily")
        if is_dynamic_import(node) and not lazy:
            found.append(f"{module}:{node.lineno} imports by a computed name; only {LAZY_ROOMS[0]}/ does")
    return found


def room_of(module: str) -> str:
    """`data` of `llamita.data.packing`, `backend.torch` of what lies there, empty for the package itself."""
    parts = module.split(".")[1:]
    return next((room for n in (2, 1) if (room := ".".join(parts[:n])) in RANK), parts[0] if parts else "")


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


@pytest.mark.parametrize("path", sorted(set(PACKAGE.rglob("*.py")) - set(COURSES.rglob("*.py"))), ids=module_of)
def test_a_module_imports_only_from_rooms_above_it(path: Path) -> None:
    assert faults(module_of(path), path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("llamita.model.config", "from llamita.storage import files", "storage is not above model"),
        ("llamita.data.packing", "import llamita.training.trainer", "training is not above data"),
        ("llamita.data.packing", "from llamita import workflows", "workflows is not above data"),
        ("llamita.data.packing", "from ..inference import engine", "inference is not above data"),
        ("llamita.data", "from ..inference import engine", "inference is not above data"),
        ("llamita.text.chat", "from llamita.storage.formats import gguf", "storage.formats is not above text"),
        ("llamita.training.trainer", "from llamita.inference import llm", "inference is not above training"),
        ("llamita.inference.llm", "import llamita.training.schedule", "training is not above inference"),
        ("llamita.training.trainer", "from llamita.backend.torch.train import losses", "a backend is passed in"),
        ("llamita.backend.interface", "import llamita.inference.engine", "inference is not above backend"),
        ("llamita.training.trainer", "import torch.nn as nn", "only backend.torch may"),
        ("llamita.backend.step_layout", "import torch", "only backend.torch may"),
        ("llamita.cli.train", "def run():\n    import torch", "only backend.torch may"),
        ("llamita.backend.torch.model.llama", "from mlx import core", "only backend.mlx may"),
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
        ("llamita.backend.torch.model.layers", "from torch import nn\nfrom llamita.backend.torch.train import losses"),
        ("llamita.backend.mlx.infer.runner", "from llamita.backend.interface import Plan"),
        ("llamita.training.trainer", "def draw():\n    import matplotlib.pyplot"),
        ("llamita.text.tokenizer", "try:\n    from llamita.storage import files\nexcept ImportError:\n    raise"),
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
    few = ("", ".cli", ".cli.main", ".cli.together", ".training", ".training.exit_status", ".training.launch")
    assert ours == [f"llamita{name}" for name in few]


def test_nothing_imports_the_files_of_a_course() -> None:
    for path in set(PACKAGE.rglob("*.py")) - set(COURSES.rglob("*.py")):
        assert "llamita.learn.tracks" not in path.read_text(), path


def test_one_backend_may_not_import_the_other() -> None:
    found = faults("llamita.backend.mlx.model.llama", "import llamita.backend.torch.model.llama")
    assert any("backend.torch is not above backend.mlx" in fault for fault in found)


def test_importing_the_package_loads_nothing_and_its_names_are_found_when_asked_for() -> None:
    code = (
        "import sys, llamita\n"
        "heavy = {'torch', 'mlx', 'numpy', 'rich', 'tyro'}\n"
        "assert not heavy & set(sys.modules)\n"
        "llamita.SamplingParams(max_tokens=1)\n"
        "assert not heavy & set(sys.modules)\n"
        "for name in llamita.__all__: getattr(llamita, name)\n"
        "assert llamita.load == llamita.LLM.load and llamita.save is llamita.LLM.save\n"
        "assert not {'torch', 'mlx'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pytorch_on_a_cpu_loads_no_triton() -> None:
    code = (
        "import sys; from llamita.backend.torch import backend, devices; import torch\n"
        "assert devices.table_kernel(torch.device('cpu')) is None\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
