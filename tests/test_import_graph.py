"""Imports run left to right only: the walk over every file's imports, and proof that the walk can fail."""

import ast
import sys
from pathlib import Path

import pytest

# A room may import itself and the rooms of earlier rows; rooms of one row do not know one another.
ROWS = [
    {"vlblocks_kernels"},
    {"vlblocks.ops"},
    {"vlblocks.nn", "vlblocks.losses"},
    {"vlblocks.models"},
    {"vlblocks.generation"},
    {"vlblocks.data", "vlblocks.training", "vlblocks.evaluation"},
    {"vlblocks_recipes"},
]
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
FOLDERS = {"vlblocks": "vlblocks", "kernels/vlblocks_kernels": "vlblocks_kernels", "recipes": "vlblocks_recipes"}


def sources(root: Path) -> dict[str, str]:
    """Module name -> source of every file; a package's own file has the name `package.__init__`."""
    return {
        ".".join([package, *path.relative_to(root / folder).with_suffix("").parts]): path.read_text(encoding="utf-8")
        for folder, package in FOLDERS.items()
        for path in sorted((root / folder).rglob("*.py"))
    }


def room_of(module: str) -> str | None:
    """The room of one of our modules; None for other people's."""
    parts = module.split(".")
    if parts[0] in ("vlblocks_kernels", "vlblocks_recipes"):
        return parts[0]
    return ".".join(parts[:2]) if parts[0] == "vlblocks" else None


def imports(module: str, source: str, ours: set[str]) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name` reaches a module when `name` is one.
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                found.add(inner if {inner, f"{inner}.__init__"} & ours else target)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__", "find_spec"):
                found.add(str(node.args[0].value))
    return found


def arrows_back(files: dict[str, str]) -> list[str]:
    """Every import that the house forbids."""
    wrong = []
    for module, source in files.items():
        room = room_of(module)
        for target in sorted(imports(module, source, set(files))):
            other = room_of(target)
            if other is None or other == room:
                continue
            if other == "vlblocks":
                # The bare package says nothing and so may be imported, but not from below it.
                allowed = room != "vlblocks_kernels"
            elif other == "vlblocks.errors":
                allowed = room != "vlblocks_kernels"
            else:
                allowed = room in ROW and other in ROW and ROW[other] < ROW[room]
            if not allowed:
                wrong.append(f"{module} -> {target}")
    return wrong


def foreign(files: dict[str, str], room: str) -> set[str]:
    """The other people's packages that a room imports, the standard library's aside."""
    names = {
        target.split(".")[0]
        for module, source in files.items()
        if room_of(module) == room
        for target in imports(module, source, set(files))
    }
    return {name for name in names if room_of(name) is None and name not in sys.stdlib_module_names}


def test_no_arrow_points_back(root):
    files = sources(root)
    assert {room_of(module) for module in files} >= {"vlblocks_kernels", "vlblocks.ops", "vlblocks_recipes"}
    assert arrows_back(files) == []


def test_every_room_has_its_place(root):
    rooms = {room_of(module) for module in sources(root)}
    assert rooms - set(ROW) == {"vlblocks.__init__", "vlblocks.errors"}


def test_kernels_need_torch_and_triton_only(root):
    assert foreign(sources(root), "vlblocks_kernels") <= {"torch", "triton"}


HOUSE = {
    "vlblocks.__init__": "",
    "vlblocks.errors": "",
    "vlblocks.ops.__init__": "",
    "vlblocks.ops.attention": "",
    "vlblocks.nn.__init__": "",
    "vlblocks.nn.heads": "",
    "vlblocks.models.towers": "",
    "vlblocks.data.mixer": "",
    "vlblocks_kernels.__init__": "",
    "vlblocks_recipes.unimo2.train": "",
}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vlblocks.ops.attention", "import vlblocks.nn"),
        ("vlblocks.ops.attention", "from vlblocks import nn"),
        ("vlblocks.ops.attention", "from ..nn import heads"),
        ("vlblocks.ops.attention", "from .. import nn"),
        ("vlblocks.ops.__init__", "from ..nn.heads import Projection"),
        ("vlblocks.nn.heads", "def late():\n    from vlblocks.losses import itc"),
        ("vlblocks.nn.heads", "if True:\n    import vlblocks.models.towers as towers"),
        ("vlblocks.nn.heads", "import importlib\nimportlib.import_module('vlblocks.models')"),
        ("vlblocks.data.mixer", "from vlblocks.training import RunLog"),
        ("vlblocks.models.towers", "import vlblocks_recipes.unimo2.train"),
        ("vlblocks.models.towers", "import vlblocks.workshop"),
        ("vlblocks_kernels.__init__", "from vlblocks.errors import UserError"),
        ("vlblocks_kernels.__init__", "import vlblocks"),
        ("vlblocks.errors", "import vlblocks.ops"),
        ("vlblocks.__init__", "from vlblocks.nn import heads"),
    ],
)
def test_the_walk_sees_an_arrow_back(module, line):
    assert len(arrows_back({**HOUSE, module: line})) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vlblocks.ops.attention", "import vlblocks_kernels, torch, os.path"),
        ("vlblocks.ops.attention", "from .segments import SegmentMask\nfrom vlblocks.errors import UserError"),
        ("vlblocks.nn.heads", "from vlblocks import ops\nfrom ..ops.attention import attention"),
        ("vlblocks.data.mixer", "from vlblocks.models.towers import ImageTower"),
        ("vlblocks_recipes.unimo2.train", "from vlblocks.training import RunLog\nfrom . import train"),
    ],
)
def test_the_walk_lets_arrows_forward_pass(module, line):
    assert arrows_back({**HOUSE, module: line}) == []


def test_foreign_packages_are_found_and_the_standard_library_is_not():
    files = {**HOUSE, "vlblocks_kernels.attention": "import os, numpy.linalg\nfrom torch import nn\nfrom . import x"}
    assert foreign(files, "vlblocks_kernels") == {"numpy", "torch"}
