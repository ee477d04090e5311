"""Imports run one way, training stays free of Ray and MLflow, and public names are listed."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "platform" / "bessemer"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the top of the house to its ground: a room may import its own modules and any room below it.
LEVELS: tuple[set[str], ...] = (
    {"cli"},
    {"orchestration"},
    {"training", "evaluation", "tracking"},
    {"systems", "data"},
    {"nn", "spec"},
    {"stores"},
    {"errors", "files"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Between rooms of one level only these, so that there is no cycle.
SIDEWAYS = {
    ("data", "systems"),  # streams yield the contract's Batch
    ("evaluation", "training"),  # samples are drawn from the run's random numbers, training/rng.py
}
# The trainer runs under plain torchrun with torch, deepspeed, webdataset, numpy and pydantic alone: what it is made of
# never imports the first, not even in a function, and the second only in functions that need it.
TRAINER = {"training", "systems", "data", "nn", "spec", "stores", "errors", "files"}
NEVER_IN_TRAINER = {"ray", "mlflow"}
_STORES = {"boto3", "botocore", "fsspec", "urllib3"}
NOT_AT_TOP_OF_TRAINER = {"matplotlib", "pyarrow", "sklearn", "scipy", "typer", "rich"} | _STORES


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str) -> Iterator[str]:
    """Every module that `source` imports anywhere: at the top, in functions, for type checkers, by importlib."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "bessemer" and len(parts) > 1 and parts[1] in LEVEL else None


def wrong_imports(source: str, module: str) -> list[str]:
    own = room_of(module)
    if own is None:  # bessemer/__init__.py, which everybody may import
        return [name for name in imports(source, module) if name.startswith("bessemer")]
    wrong = []
    for name in imports(source, module):
        room = room_of(name)
        if room is not None and room != own and LEVEL[room] <= LEVEL[own] and (own, room) not in SIDEWAYS:
            wrong.append(name)
        if own in TRAINER and name.split(".")[0] in NEVER_IN_TRAINER:
            wrong.append(name)
    if own in TRAINER:
        wrong += [name for name in imports_at_top(source, module) if name.split(".")[0] in NOT_AT_TOP_OF_TRAINER]
    return wrong


def imports_at_top(source: str, module: str) -> Iterator[str]:
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imports(ast.unparse(tree), module)


def test_every_room_has_its_level() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir() if p.is_dir() or p.suffix == ".py"} - {"__init__", "__pycache__"}
    assert rooms - {"py"} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_run_one_way(path: Path) -> None:
    assert wrong_imports(path.read_text(encoding="utf-8"), dotted(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bessemer.training.loop", "def f():\n    import ray"),
        ("bessemer.training.loop", "from mlflow.tracking import MlflowClient"),
        ("bessemer.training.loop", "from bessemer.evaluation import names"),
        ("bessemer.systems.contract", "from bessemer.data.reading import stream"),
        ("bessemer.data.sources.source", "from sklearn.datasets import load_digits"),
        ("bessemer.nn.norm", "from bessemer import systems"),
        ("bessemer.stores.s3", "import boto3"),
        ("bessemer.stores.local", "from bessemer.data import manifest"),
        ("bessemer.spec.job", "from ..data import manifest"),
        ("bessemer.data.packing.pack", "import importlib\nimportlib.import_module('bessemer.cli.app')"),
    ],
)
def test_the_guard_sees_a_wrong_import(module: str, source: str) -> None:
    assert wrong_imports(source, module)


@pytest.mark.slow
def test_the_worker_needs_neither_ray_nor_mlflow() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'matplotlib', 'sklearn', 'typer', 'boto3', 'urllib3'):\n"
        "    sys.modules[name] = None\n"
        "import bessemer.orchestration.worker\n"
        "from bessemer.systems.registry import all_systems\n"
        "assert all_systems()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def exports_names(path: Path) -> bool:
    """False for private modules, for those that are run, and for `__init__.py` files that only mark a package."""
    if path.name != "__init__.py":
        return not path.stem.startswith("_")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.ImportFrom) for node in body)


@pytest.mark.parametrize("path", [path for path in MODULES if exports_names(path)], ids=dotted)
def test_public_names_are_listed_and_exist(path: Path) -> None:
    if path.stem.endswith("_triton"):
        pytest.importorskip("triton", reason="comes with PyTorch for CUDA")
    module = importlib.import_module(dotted(path))
    assert hasattr(module, "__all__"), f"{path} has no __all__"
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name), f"{path}: __all__ lists {name}, which does not exist"
        assert not name.startswith("_") or name == "__version__"
