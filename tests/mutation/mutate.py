"""Generate mutants: copies of one function's code with one small change of its syntax tree.

A mutant belongs to a function and not to a line of text, so a rename or a reformatting does not break it. It is
introduced by replacing `__code__` of the function object, which every module that imported the function shares.
"""

import ast
import builtins
import gc
import importlib
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_COMPARISONS = ((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn))
_COMPARE: dict[type, type] = {a: b for pair in _COMPARISONS for a, b in (pair, pair[::-1])}
_ARITHMETIC = ((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr))
_BINARY: dict[type, type] = {a: b for pair in _ARITHMETIC for a, b in (pair, pair[::-1])}
_BINARY |= dict.fromkeys((ast.FloorDiv, ast.Mod, ast.Pow), ast.Mult)
_COMMUTATIVE = {"maximum", "minimum", "max", "min", "equal", "array_equal", "allclose"}
_KEYWORDS_WITHOUT_EFFECT = {"device", "strict", "non_blocking", "set_to_none"}  # on the CPU, or for correct callers
_CALLS_WITHOUT_EFFECT = {"phase", "cast", "super", "print", "warn", "tqdm"}  # messages and progress


class Mutant(NamedTuple):
    """One change.

    Attributes:
        function: the function's qualified name in its module.
        change: "before -> after", with " #2" for the second such change in the function.
        line: line of the change in the module's file.
        functions: function objects that get the code.
        code: the changed code.
    """

    function: str
    change: str
    line: int
    functions: tuple[types.FunctionType, ...]
    code: types.CodeType

    def introduce(self) -> None:
        """Change the functions in this process."""
        for function in self.functions:
            function.__code__ = self.code


def mutants_of(module_name: str, only: str = "") -> Iterator[Mutant]:
    """Yield the mutants of the functions of a module whose qualified name begins with `only`."""
    module = importlib.import_module(module_name)
    file = str(module.__file__)
    tree = ast.parse(Path(file).read_text())
    for name, definition in _definitions(tree.body):
        functions = tuple(
            found
            for found in gc.get_objects()
            if type(found) is types.FunctionType
            and found.__code__.co_filename == file
            and found.__code__.co_qualname == name
        )
        if not name.startswith(only) or not functions:
            continue
        seen: Counter[str] = Counter()
        for old, new in [pair for node in _walk(definition) for pair in _changes(node, module)]:
            ast.fix_missing_locations(ast.copy_location(new, old))
            change = f"{_text(old)} -> {_text(new)}"
            seen[change] += 1
            _Replace(old, new).visit(tree)
            code = _find(compile(tree, file, "exec"), name)
            _Replace(new, old).visit(tree)
            number = f" #{seen[change]}" if seen[change] > 1 else ""
            yield Mutant(name, change + number, getattr(old, "lineno", definition.lineno), functions, code)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _text(node: ast.AST) -> str:
    """Return the node's source in one line; of a compound statement, the first line."""
    return ast.unparse(node).partition("\n")[0]


def _definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{prefix}{node.name}.")


def _find(code: types.CodeType, name: str) -> types.CodeType:
    """Return the last definition of a qualified name (the code of `@overload` and of conditional ones comes first)."""
    pending, found = [code], None
    while pending:
        code = pending.pop(0)
        found = code if code.co_qualname == name else found
        pending += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    assert found is not None, name
    return found


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that are computed when the function is called; not annotations, decorators, messages, asserts."""
    if isinstance(node, ast.FunctionDef):
        children: list[ast.AST] = [*node.body]
    elif isinstance(node, ast.AnnAssign):
        children = [node.value] if node.value else []
    elif (
        isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or getattr(node, "arg", "") in _KEYWORDS_WITHOUT_EFFECT
    ):
        children = []
    else:
        children = list(ast.iter_child_nodes(node))
    yield node
    for child in children:
        yield from _walk(child)


def _changes(node: ast.AST, module: types.ModuleType) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield pairs of a node and what replaces it."""
    match node:
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                yield node, ast.Compare(left, [*ops[:i], _COMPARE[type(op)](), *ops[i + 1 :]], comparators)
        case ast.BinOp(left, op, right) if type(op) in _BINARY:
            yield node, ast.BinOp(left, _BINARY[type(op)](), right)
        case ast.AugAssign(target, op, value):
            if type(op) in _BINARY:
                yield node, ast.AugAssign(target, _BINARY[type(op)](), value)
            yield node, ast.Pass()
        case ast.BoolOp(op, values):
            yield node, ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, _copy(operand)
        case ast.Constant(bool() as value):
            yield node, ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield node, ast.Constant(value + 1)
        case ast.IfExp(test, body, orelse):
            yield node, ast.IfExp(test, orelse, body)
        case ast.If(test, body, orelse) if not isinstance(test, ast.Compare | ast.UnaryOp | ast.BoolOp):
            yield node, ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Slice(lower, upper, step):
            if lower:
                yield node, ast.Slice(None, upper, step)
            if upper:
                yield node, ast.Slice(lower, None, step)
        case ast.comprehension(target, iterable, ifs) if ifs:
            yield node, ast.comprehension(target, iterable, [], node.is_async)
        case ast.Call():
            yield from _changes_of_call(node, module)
        case ast.Expr(ast.Call() as call) if _name(call) not in _CALLS_WITHOUT_EFFECT:
            yield node, ast.Pass()
        case ast.Raise() | ast.Continue() | ast.Break():
            yield node, ast.Pass()
        case ast.Assign([ast.Subscript() | ast.Attribute()], _):
            yield node, ast.Pass()
        case ast.Assign([ast.Name(name)], value):  # a later value of the same variable
            if any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(value)):
                yield node, ast.Pass()
        case ast.With(items, body):
            for item in items:
                if item.optional_vars is None and _name(item.context_expr) not in _CALLS_WITHOUT_EFFECT:
                    left = [other for other in items if other is not item]
                    yield node, ast.With(left, body) if left else ast.If(ast.Constant(True), body, [])


def _copy(node: ast.AST) -> ast.AST:
    """Return another node of the same meaning, so that it can be told from the one inside the original."""
    return type(node)(**dict(ast.iter_fields(node)))


def _name(node: ast.AST) -> str:
    """Return the last part of the called name, or "" for anything but a call."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", "") or getattr(function, "id", "")


def _changes_of_call(call: ast.Call, module: types.ModuleType) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield the call with arguments swapped, with a keyword left out, and its receiver or first argument alone."""
    name, arguments = _name(call), call.args
    if name in _CALLS_WITHOUT_EFFECT or (isinstance(call.func, ast.Name) and hasattr(builtins, name)):
        return
    if name not in _COMMUTATIVE and not any(isinstance(argument, ast.Starred) for argument in arguments):
        for i in range(len(arguments) - 1):
            swapped = [*arguments[:i], arguments[i + 1], arguments[i], *arguments[i + 2 :]]
            yield call, ast.Call(call.func, swapped, call.keywords)
    for keyword in call.keywords:
        if keyword.arg is not None and keyword.arg not in _KEYWORDS_WITHOUT_EFFECT:
            yield call, ast.Call(call.func, arguments, [other for other in call.keywords if other is not keyword])
    receiver = call.func.value if isinstance(call.func, ast.Attribute) else None
    root = receiver
    while isinstance(root, ast.Attribute):
        root = root.value
    is_global = isinstance(root, ast.Name) and isinstance(getattr(module, root.id, None), types.ModuleType | type)
    if receiver is not None and not is_global and not isinstance(receiver, ast.Constant):
        yield call, _copy(receiver)
    elif arguments and not isinstance(arguments[0], ast.Starred):
        yield call, _copy(arguments[1 if name == "where" else 0])
