"""Signature and docstring pairs, taken from Python source text with ``ast`` only.

Nothing is imported and nothing is run: a source file is parsed, each function, method and class with a docstring
becomes an `Entry`, and the rules below say which of its parts are clean enough to train on.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

MIN_WORDS, MAX_WORDS = 4, 20
MAX_PROMPT = 200
MAX_BODY = 1200

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

_MARKUP = re.compile(r"[`*<>{}%\[\]|\\=#@~^$:;]|__|https?|www\.|\.\.|TODO|FIXME|XXX|\(s\)")
_INNER_END = re.compile(r"[.!?][\"')]?\s")
_ASCII_LINE = re.compile(r"[ -~]+\Z")
_ASCII_TEXT = re.compile(r"[ -~\n]+\Z")
_DIRECTIVE = re.compile(r"^\s*(?:>>>|\.\. |:\w|@\w|[-=~^]{3,}|[*+-] )", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One function, method or class with a docstring.

    Attributes:
        qualname: Dotted name inside the file, such as ``Owner.method``.
        prompt: Source form up to and with the opening quotes of the docstring.
        docstring: The docstring with its indentation removed.
        source: Source text of the whole definition without decorators; empty for a class.
        signature_lines: Number of lines of `source` that belong to the signature.
    """

    qualname: str
    prompt: str
    docstring: str
    source: str
    signature_lines: int


def signature(node: Definition) -> str:
    """Return the one-line source form of a definition, such as ``def name(x, y=1) -> int:``.

    Args:
        node: The definition.

    Returns:
        The line without decorators, defaults written by `ast.unparse`.
    """
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    arrow = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){arrow}:"


def make_prompt(node: Definition, owner: str | None) -> str:
    """Return the prompt: the signature and the opening quotes, below the owner's name for a method.

    Args:
        node: The definition.
        owner: Name of the class that a method belongs to, or None.

    Returns:
        ``def f(x):``, a new line, four spaces and three quotes; for a method one level deeper under ``class Owner:``.
    """
    if owner is None or isinstance(node, ast.ClassDef):
        return f'{signature(node)}\n    """'
    return f'class {owner}:\n    {signature(node)}\n        """'


def summary(docstring: str) -> str | None:
    """Return the first paragraph of a docstring if it is one clean sentence.

    Args:
        docstring: A docstring, indented or not.

    Returns:
        One ASCII sentence of 4 to 20 words that begins with a capital letter, ends with a period and holds no markup;
        None for anything else.
    """
    text = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    if not MIN_WORDS <= len(text.split()) <= MAX_WORDS or not _ASCII_LINE.match(text):
        return None
    if not text.endswith(".") or not text[0].isupper() or _MARKUP.search(text) or _INNER_END.search(text):
        return None
    return text


def paragraphs(docstring: str) -> str | None:
    """Return the plain paragraphs of a docstring, for the pretraining corpus.

    Args:
        docstring: A docstring without indentation.

    Returns:
        The paragraphs up to the first one with markup, sections or an indented block, joined by blank lines; None when
        fewer than two are left or they are longer than 1,200 characters.
    """
    kept: list[str] = []
    for block in docstring.split("\n\n"):
        block = block.strip("\n").rstrip()
        words = " ".join(block.split())
        if not _ASCII_TEXT.match(block) or _DIRECTIVE.search(block) or block.startswith(" "):
            break
        if block.split("\n")[0].endswith(":"):
            break
        if not words.endswith((".", "!", "?")) or len(words.split()) < MIN_WORDS:
            break
        kept.append(block)
    text = "\n\n".join(kept)
    return text if len(kept) > 1 and len(text) <= MAX_BODY else None


def short_function(entry: Entry) -> tuple[str, str] | None:
    """Return a short function's source as (signature lines, rest), for the pretraining corpus.

    Args:
        entry: The function.

    Returns:
        Both parts as text; None for a class, for source with a character outside ASCII, and past 1,200 characters.
    """
    lines = entry.source.splitlines()
    head, rest = "\n".join(lines[: entry.signature_lines]), "\n".join(lines[entry.signature_lines :])
    if not rest.strip() or len(head) > MAX_PROMPT or len(rest) > MAX_BODY or not _ASCII_TEXT.match(f"{head}\n{rest}"):
        return None
    if re.search(r"https?://|copyright|noqa|type: ignore", rest, re.IGNORECASE):
        return None
    return f"{head}\n", rest


def walk(source: str) -> Iterator[Entry]:
    """Yield an entry for each documented function, method and class of a source text, in source order.

    Args:
        source: Text of one Python file.

    Yields:
        The entries whose prompt is ASCII and at most 200 characters long.

    Raises:
        SyntaxError: If the text is not Python of the running interpreter.
    """
    yield from _walk_body(ast.parse(source), source.splitlines(), owner=None, prefix="")


def _walk_body(parent: ast.AST, lines: list[str], owner: str | None, prefix: str) -> Iterator[Entry]:
    for node in ast.iter_child_nodes(parent):
        if not isinstance(node, Definition):
            yield from _walk_body(node, lines, owner, prefix)
            continue
        qualname = f"{prefix}{node.name}"
        entry = _entry(node, lines, owner, qualname)
        if entry is not None:
            yield entry
        is_class = isinstance(node, ast.ClassDef)
        yield from _walk_body(node, lines, node.name if is_class else None, f"{qualname}.")


def _entry(node: Definition, lines: list[str], owner: str | None, qualname: str) -> Entry | None:
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    prompt = make_prompt(node, owner)
    if len(prompt) > MAX_PROMPT or not _ASCII_TEXT.match(prompt):
        return None
    if isinstance(node, ast.ClassDef):
        return Entry(qualname, prompt, docstring, "", 0)
    own = lines[node.lineno - 1 : node.end_lineno]
    source = textwrap.dedent("\n".join(own))
    return Entry(qualname, prompt, docstring, source, node.body[0].lineno - node.lineno)
