"""The house rules that a machine can check: arrows between rooms, light imports, no pickle."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "gsa"
FILES = sorted(ROOT.rglob("*.py"))

FLOORS = [
    {"ops"},
    {"layers"},
    {"model"},
    {"generation", "data", "training", "conversion", "evaluation", "benchmark"},
    {"experiments", "recipes", "architectures"},
    {"cli", "cli_options", "__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Doors between rooms of one floor, each with its reason.
DOORS = {
    ("training", "data"),  # a training run reads shards
    ("conversion", "data"),  # a teacher's tokenizer is opened as that of shards
    ("conversion", "training"),  # files are written as a run's are: whole or not at all
    ("evaluation", "data"),  # held-out text comes as shards
    ("evaluation", "generation"),  # models are opened and answers written as by the decoder
    ("evaluation", "training"),  # files are written as a run's are: whole or not at all
    ("benchmark", "training"),  # training is timed by the engine's own parts
    ("benchmark", "generation"),  # and decoding by the decoder
    ("benchmark", "conversion"),  # what a distillation costs follows from its stages
    ("experiments", "recipes"),  # experiments are recipes with one thing changed
    ("experiments", "architectures"),  # or with another architecture
    ("cli", "cli_options"),  # options of commands
    ("__main__", "cli"),  # python -m gsa
}

# Where the names of `from gsa import ...` live; __version__ belongs to no room.
HOMES = {
    "GatedSlotAttention": "layers",
    "GSAConfig": "model",
    "GSAModel": "model",
    "GSAForCausalLM": "model",
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT.parent))


def room_of(path: Path) -> str:
    """The room of a file: its folder under gsa/, or its own name."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, also inside functions."""
    package = ("gsa", *path.relative_to(ROOT).parts[:-1])
    rooms = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "gsa" and len(target) > 1 and target[1] != "__version__":
                rooms.add(HOMES.get(target[1], target[1]))
    return rooms


ROOMED = [path for path in FILES if path != ROOT / "__init__.py"]


def violations(room: str, imported: set[str]) -> list[str]:
    wrong = []
    for other in sorted(imported - {room}):
        if other not in FLOOR:
            wrong.append(f"{other} is on no floor")
        elif FLOOR[other] >= FLOOR[room] and (room, other) not in DOORS:
            wrong.append(f"{room} may not import {other}")
    return wrong


@pytest.mark.parametrize("path", ROOMED, ids=name_of)
def test_arrows_point_down(path):
    room = room_of(path)
    assert room in FLOOR, f"{room} is on no floor of the house"
    assert not violations(room, imported_rooms(path))


def test_the_arrow_test_can_fail():
    assert violations("ops", {"model"}) == ["ops may not import model"]
    assert violations("data", {"training"}) == ["data may not import training"]
    assert violations("generation", {"data", "model"}) == ["generation may not import data"]
    assert violations("layers", {"attic"}) == ["attic is on no floor"]
    assert not violations("training", {"data", "model", "ops"})
    assert imported_rooms(ROOT / "ops" / "api.py") == {"ops"}


def called(node: ast.AST) -> str:
    """A dotted name such as torch.load, or an empty string."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_NAMES = {"torch.load", "torch.save", "os.environ", "os.environb", "os.getenv"}
FORBIDDEN_FLAGS = {"trust_remote_code", "allow_pickle"}


def forbidden(module: ast.Module) -> list[str]:
    """Pickle, remote code, or behaviour read from the environment: what is used, with its line."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = {base.split(".")[0]} & FORBIDDEN_MODULES
            names |= {f"{base}.{alias.name}" for alias in node.names} & FORBIDDEN_NAMES
        elif isinstance(node, ast.Attribute):
            names = {called(node)} & FORBIDDEN_NAMES
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_FLAGS:
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            names = set() if off else {node.arg}
        else:
            continue
        found += [f"line {node.lineno}: {name}" for name in sorted(names)]
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_pickle_no_remote_code_no_environment(path):
    assert not forbidden(tree(path))


def test_the_forbidden_test_can_fail():
    source = """
import pickle
from os import environ
torch.load(f)
numpy.load(f, allow_pickle=True)
AutoModel.from_pretrained(d, trust_remote_code=flag)
AutoModel.from_pretrained(d, trust_remote_code=False)
"""
    found = [line.split(": ")[1] for line in forbidden(ast.parse(source))]
    assert sorted(found) == [
        "allow_pickle",
        "os.environ",
        "pickle",
        "torch.load",
        "trust_remote_code",
    ]


STRICT = [path for path in FILES if room_of(path) in ("ops", "layers")]


@pytest.mark.parametrize("path", STRICT, ids=name_of)
def test_signatures_swallow_nothing(path):
    loose = [
        f"{node.name} (line {node.lineno})"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg
    ]
    assert not loose, "keyword arguments are named, never collected"


def loaded_after(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of the packages are loaded in a fresh interpreter after a statement."""
    program = f"import sys\n{statement}\nprint(*(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


HEAVY = ("transformers", "triton", "accelerate", "datasets", "peft", "matplotlib", "pyarrow")


def test_the_operator_imports_only_torch():
    already = set(loaded_after("import torch", HEAVY))
    for statement in ("import gsa.ops", "from gsa.ops import gated_slot_attention"):
        assert set(loaded_after(statement, HEAVY)) <= already
    call = (
        "import torch; from gsa.ops import gated_slot_attention; x = torch.ones(1, 3, 2, 4); "
        "gated_slot_attention(x, x, x, -x)"
    )
    assert "transformers" not in loaded_after(call, HEAVY)


def test_the_package_itself_is_light():
    assert loaded_after("import gsa", ("torch", *HEAVY)) == []
