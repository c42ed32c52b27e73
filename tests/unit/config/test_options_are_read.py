"""Every option that a user can set is read somewhere: none is promised and ignored."""

import ast
from pathlib import Path

from sheeprlhf.config.registry import ROOTS, choices, groups, options

PACKAGE = Path(__file__).parents[3] / "sheeprlhf"
# These walk over all options alike, which is no use of any one of them.
GENERIC = {"config/registry.py", "config/option_checks.py", "apps/show.py"}

EXPLAINED = {
    "dry_run",  # registry.to_typed turns it into other options' values
    "experiment",  # a label in the saved configuration; Hydra has applied the recipe
}


def names_read() -> set[str]:
    """Every attribute that the package reads, by `.name` or by `getattr(x, "name")`."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in GENERIC:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def test_every_option_is_read_somewhere():
    keys = set()
    for verb, root in ROOTS.items():
        keys |= {option.key for option in options(root()) if option.key not in groups(verb)}
        for group in groups(verb):
            for cls in choices(group, verb).values():
                keys |= {option.key for option in options(cls(), f"{group}.")}
    read = names_read()
    assert sorted(key for key in keys if key.split(".")[-1] not in read and key not in EXPLAINED) == []
