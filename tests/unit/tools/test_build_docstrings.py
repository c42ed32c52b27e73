"""The builder's pure functions, on small source texts."""

from pathlib import Path

import pytest

from tools.build_docstrings import is_source, scan
from tools.docstring_pairs import summary, walk
from tools.docstring_splits import Pair, deduplicate
from tools.licences import Distribution, recognise

SOURCE = '''
def plain(x, *, y=1, z: str = "a") -> int:
    """Return the sum of both.

    More text.
    """
    return x + y

async def waiting(self):
    """Wait for the other side."""

class Owner(Base, metaclass=Meta):
    """Keeps all of its children."""

    @property
    def name(self) -> str:
        """Return the name of it."""
        return self._name

    def silent(self): pass

    class Inner:
        def deep(self):
            """Return the depth of it."""

def outer():
    def inner():
        """Return the inner value here."""

if True:
    def conditional(): 'Return the only value here.'
'''

MIT = """The MIT License
Copyright (c) 2020 Some One
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction.
The above copyright notice and this permission notice shall be included in all copies."""
BSD = """Copyright (c) 2019, Somebody. Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:
1. Redistributions of source code must retain the above copyright notice.
2. Redistributions in binary form must reproduce the above copyright notice."""
BSD_3 = f"{BSD}\n3. Neither the name of it nor its contributors may be used to endorse or promote products."


def pair(response: str, package: str = "a", prompt: str | None = None) -> Pair:
    return Pair(prompt or f'def {response}():\n    """', response, package, "1", "a.py", "f", "MIT")


def test_walk_gives_the_source_form_of_each_documented_definition() -> None:
    found = {entry.qualname: entry.prompt for entry in walk(SOURCE)}
    assert found == {
        "plain": 'def plain(x, *, y=1, z: str=\'a\') -> int:\n    """',
        "waiting": 'async def waiting(self):\n    """',
        "Owner": 'class Owner(Base, metaclass=Meta):\n    """',
        "Owner.name": 'class Owner:\n    def name(self) -> str:\n        """',
        "Owner.Inner.deep": 'class Inner:\n    def deep(self):\n        """',
        "outer.inner": 'def inner():\n    """',
        "conditional": 'def conditional():\n    """',
    }


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum of both.", "Return the sum of both."),
        ("\n    Return the sum\n    of both.\n\n    Args:\n        x: One.\n    ", "Return the sum of both."),
        ("Return the sum of both", None),
        ("Return it now.", None),
        ("Return " + "a very " * 10 + "long sum.", None),
        ("return the sum of both.", None),
        ("Return the sum. Then return it.", None),
        ("Return the caf\u00e9 of both.", None),
        ("Return the ``sum`` of both.", None),
        ("Return the :class:`sum` of both.", None),
        ("Return the <b>sum</b> of both.", None),
        ("Return 50 % of both sums.", None),
        ("Return the *sum* of both.", None),
        ("Return the {sum} of both.", None),
        ("Return https://example.org of both.", None),
        ("Return the sum of both...", None),
        (">>> Return the sum of both.", None),
        ("", None),
    ],
)
def test_summary(docstring: str, expected: str | None) -> None:
    assert summary(docstring) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.py", True),
        ("a/contest.py", True),
        ("a/tests/b.py", False),
        ("a/test_b.py", False),
        ("a/b_test.py", False),
        ("a/conftest.py", False),
        ("pip/_vendor/rich/a.py", False),
    ],
)
def test_is_source(path: str, expected: bool) -> None:
    assert is_source(path) is expected


def test_scan_reads_files_and_passes_over_bad_ones(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "bad.py").write_text("def f(:", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b'def f():\n    """Return the caf\xe9 of it."""\n')
    (tmp_path / "gpl.py").write_text(f"# GNU General Public License\n{SOURCE}", encoding="utf-8")
    sentinel = tmp_path / "sentinel"
    (tmp_path / "runs.py").write_text(f"open({str(sentinel)!r}, 'w')\n", encoding="utf-8")
    files = ("a.py", "bad.py", "gone.py", "gpl.py", "latin.py", "runs.py")
    found = scan([Distribution("a", "1", files, tmp_path, "MIT", "", (), MIT)])
    assert {pair.file for pair in found.pairs} == {"a.py"}
    assert {pair.qualname for pair in found.pairs} >= {"plain", "waiting", "Owner", "Owner.name"}
    assert not sentinel.exists()


def test_duplicates_of_summary_or_prompt_are_dropped_and_third_person_is_kept() -> None:
    kept = deduplicate(
        [
            pair("Return the value of it.", "a", "def f():"),
            pair("Returns the value, of it.", "b", "def g():"),
            pair("Parse the whole of it.", "c", "def g( ):"),
            pair("Keep the whole of it.", "d", "def h():"),
        ],
        seed=1,
    )
    assert {entry.package for entry in kept} == {"b", "d"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MIT, "MIT"),
        (BSD, "BSD-2-Clause"),
        (BSD_3, "BSD-3-Clause"),
        (f"{MIT}\n\nBundled: GNU General Public License", "MIT"),
        (f"GNU General Public License\n\n{MIT}", None),
        (BSD + "\nAll advertising materials must mention it.", None),
        ("All rights reserved.", None),
        ("", None),
    ],
)
def test_recognise(text: str, expected: str | None) -> None:
    assert recognise(text) == expected
