"""Who may import whom: only what lies below, siblings never each other, nothing heavy where speed counts."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "sheeprlhf"
LAYERS = [
    {"utils", "assets"},
    {"security"},
    {"structure"},
    {"config"},
    {"model", "data", "loss", "reward"},
    {"engine"},
    {"agent"},
    {"rollout"},
    {"task"},
    {"apps"},
    {"launch"},
    {"cli", "api"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = {"torch", "lightning", "transformers", "datasets", "peft"}
LIGHT = [
    "structure",
    "config",
    "security",
    "reward",
    "apps/chat.py",
    "apps/demo.py",
    "apps/show.py",
    "apps/export.py",
    "apps/report.py",
    "apps/list.py",
    "apps/runs.py",
    "apps/terminal.py",
    "apps/arguments.py",
    "cli.py",
    "api/jobs.py",
    "launch.py",
    "engine/rundir.py",
    "utils/errors.py",
]
ALONE = {  # narrower than the layers allow
    "loss": {"utils"},
    "reward": {"config", "security", "structure", "utils", "assets"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, nested: bool) -> Iterator[str]:
    """The modules that a file imports; without `nested`, those of its top level alone."""
    for node in ast.walk(tree) if nested else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) in LEVEL)


def test_a_file_imports_only_what_lies_below_it():
    assert [f"{path}: {problem}" for path in FILES for problem in wrong_imports(path)] == []


def wrong_imports(path):
    room = room_of(path)
    for module in imports(ast.parse(path.read_text()), nested=True):
        first, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if first == "lightning" and path != PACKAGE / "utils" / "lightning.py":
            yield f"{path.name} imports {module}, not sheeprlhf.utils.lightning"
        if first != "sheeprlhf" or other in ("", room, "__version__"):
            continue
        if room in ALONE and other not in ALONE[room]:
            yield f"{room} imports {module}"
        if other in LEVEL and LEVEL[other] >= LEVEL[room]:
            yield f"{room} imports {module}, which is not below it"


def test_what_answers_at_once_imports_nothing_heavy():
    for name in LIGHT:
        place = PACKAGE / name
        for path in place.rglob("*.py") if place.is_dir() else [place]:
            for module in imports(ast.parse(path.read_text()), nested=name == "structure"):
                assert module.partition(".")[0] not in HEAVY, f"{path} imports {module}"


def test_the_command_line_names_no_task():
    for module in imports(ast.parse((PACKAGE / "launch.py").read_text()), nested=True):
        assert not module.startswith("sheeprlhf.task")


def test_every_imported_name_exists():
    """Find a stale import, also one inside a function, and a stale dotted path ("sheeprlhf.module:name")."""
    nodes = {path: list(ast.walk(ast.parse(path.read_text()))) for path in PACKAGE.rglob("*.py")}
    names = {}
    for path, found in nodes.items():
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        names[module] = {getattr(node, "name", getattr(node, "id", "")) for node in found}
        names[module] |= {a.asname or a.name for node in found if isinstance(node, ast.ImportFrom) for a in node.names}
    for path, found in nodes.items():
        for node in found:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sheeprlhf":
                there = names.get(node.module, set())
                missing = {a.name for a in node.names if f"{node.module}.{a.name}" not in names} - there
                assert not missing or "__getattr__" in there, f"{path}: {node.module} has no {missing}"
            elif isinstance(node, ast.Constant) and re.fullmatch(r"sheeprlhf[.\w]+:\w+", str(node.value)):
                module, _, name = node.value.partition(":")
                assert name in names.get(module, ()), f"{path}: {node.value}"
