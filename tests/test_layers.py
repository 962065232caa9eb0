"""A module imports only from layers below its own, and within a layer only to the left."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parent.parent / "allfuse"

# Lowest first; within a layer, left to right. docs/extending.md explains them.
LAYERS = (
    ("base",),
    ("rule", "topology", "sync", "codec", "link", "launcher"),
    ("execute", "charge", "plan", "fusion", "split"),
    ("job", "jobfile", "store"),
    ("roles", "training", "prediction", "merge"),
    ("distill", "judge", "planner", "verify"),
    ("observe",),
    ("watching", "audience", "hosting", "api"),
    ("cli",),
)
PLACE = {
    name: (layer, column) for layer, names in enumerate(LAYERS) for column, name in enumerate(names)
}
PRIVATE_TORCH = ("torch._C", "torch._", "torch.distributed._", "torch.utils._")


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in PLACE)


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Every imported module of a file with its line, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            module = node.module or ""
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def refused(path: Path) -> list[str]:
    """What a module imports that it must not."""
    own = package_of(path)
    found = [] if own in PLACE else [f"{own} has no place in the layers"]
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "allfuse" or len(parts) == 1 or parts[1] == own:
            continue
        other = parts[1]
        if other not in PLACE:
            found.append(f"{path}:{line} imports {name} from the package's own front")
        elif own in PLACE and not PLACE[other] < PLACE[own]:
            found.append(f"{path}:{line}: {own} must not import {other}")
    return found


def test_modules_import_only_from_below_and_from_the_left() -> None:
    found = [text for path in modules() for text in refused(path)]
    assert not found, "\n".join(found)


def test_every_folder_has_a_place_in_the_layers() -> None:
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert folders <= PLACE.keys()


def test_private_names_of_torch_are_imported_in_one_file_only() -> None:
    found = [
        f"{path}:{line} imports {name}"
        for path in modules()
        if path != ROOT / "base" / "torch_private.py"
        for line, name in imports(path)
        if name.startswith(PRIVATE_TORCH)
    ]
    assert not found, "\n".join(found)


def test_the_layer_test_catches_an_import_from_above(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from allfuse.cli.app import main\n")
    ((_, name),) = imports(bad)
    assert PLACE[name.split(".")[1]] > PLACE["base"]


def test_no_file_is_named_utils() -> None:
    assert not [path for path in ROOT.rglob("*.py") if "util" in path.stem]
