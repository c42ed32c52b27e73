"""The source of a user's function by its dotted path: installed, on PYTHONPATH, or in the current directory."""

import ast
import importlib.util
import keyword
import os
import sys
import tokenize
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from typing import NamedTuple


class DottedPath(NamedTuple):
    """A function's place: `package.module` and `function`."""

    module: str
    function: str


def parse_path(text: str) -> DottedPath:
    """`package.module:function` or `package.module.function`. Raises ValueError if it is neither."""
    module, _, function = text.rpartition(":" if ":" in text else ".")
    parts = [*module.split("."), function]
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        raise ValueError(text)
    return DottedPath(module, function)


def find_module(module: str) -> ModuleSpec | None:
    """Locate a module as `import` would; None if there is none. Unlike importlib, it does not import parents."""
    loaded = getattr(sys.modules.get(module), "__spec__", None)
    if isinstance(loaded, ModuleSpec):
        return loaded  # such as os.path, which is in no package
    first, *rest = module.split(".")
    spec = _installed(first) or PathFinder.find_spec(first, [os.getcwd()])
    name = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _installed(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module without a specification, such as __main__
        return None


def hidden_by_installed(module: str) -> str | None:
    """The user's own file in the current directory, where an installed module of its name comes before it."""
    first = module.partition(".")[0]
    own, installed = PathFinder.find_spec(first, [os.getcwd()]), _installed(first)
    if own is None or own.origin is None or installed is None or own.origin == installed.origin:
        return None
    return os.path.relpath(own.origin)


def names_of(file: str) -> set[str] | None:
    """Names that a source file may define; None if they cannot be determined. Raises SyntaxError and OSError."""
    with tokenize.open(file) as source:
        try:
            tree = ast.parse(source.read(), file)
        except (UnicodeDecodeError, ValueError) as error:
            raise SyntaxError(str(error)) from error
    names = set(_bound(tree))
    return None if names & {"*", "__getattr__"} else names


def _bound(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("globals", "setattr"):
            yield "*"
