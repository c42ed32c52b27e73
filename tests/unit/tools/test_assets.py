"""The embedded data, tokenizer and model: the snapshot as it is shipped, and what builds and measures it."""

import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sheeprlhf.assets
from sheeprlhf.reward.inflect import style_of
from tools.build_docstrings import is_source, scan
from tools.docstring_pairs import summary, walk
from tools.docstring_splits import Pair, deduplicate
from tools.english import unknown_words, words_of
from tools.licences import Distribution, recognise
from tools.measure_tiny import Sampled, Seed, gates

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


DOCSTRINGS = Path(sheeprlhf.assets.__file__).parent / "docstrings"
SPLITS = ("train", "validation", "test")
COLUMNS = ["prompt", "response", "chosen", "rejected", "style", "package", "version", "file", "qualname", "licence"]
LICENCES = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "PSF-2.0", "Zlib"}

Rows = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return {split: pq.read_table(DOCSTRINGS / f"{split}.parquet").to_pylist() for split in SPLITS}


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_columns_and_sizes(rows: Rows) -> None:
    for split in SPLITS:
        schema = pq.read_schema(DOCSTRINGS / f"{split}.parquet")
        assert schema.names == COLUMNS
        assert {str(kind) for kind in schema.types} == {"string"}
    assert len(rows["train"]) >= 12_000
    assert 1_000 <= len(rows["validation"]) <= 1_500
    assert 1_000 <= len(rows["test"]) <= 1_500
    assert sum((DOCSTRINGS / f"{split}.parquet").stat().st_size for split in SPLITS) <= 2_500_000


def test_authors_of_both_styles_are_equally_many(rows: Rows) -> None:
    for split in SPLITS:
        styles = Counter(row["style"] for row in rows[split])
        assert styles == {"imperative": len(rows[split]) // 2, "third_person": len(rows[split]) // 2}


def test_no_split_shares_a_package(rows: Rows) -> None:
    packages = [{row["package"] for row in rows[split]} for split in SPLITS]
    assert sum(map(len, packages)) == len(set.union(*packages))


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected", "response"])
def test_no_text_occurs_twice_in_or_between_splits(rows: Rows, column: str) -> None:
    texts = Counter(words(row[column]) for split in SPLITS for row in rows[split])
    assert texts.most_common(1)[0][1] == 1


def test_pair_differs_in_its_first_word_only(rows: Rows) -> None:
    for split in SPLITS:
        for row in rows[split]:
            assert (style_of(row["chosen"]), style_of(row["rejected"])) == ("imperative", "third_person")
            assert row["chosen"].split(" ")[1:] == row["rejected"].split(" ")[1:]
            assert row["chosen"].split(" ")[0] != row["rejected"].split(" ")[0]
            assert row["response"] == row["chosen" if row["style"] == "imperative" else "rejected"]


def test_texts_are_clean(rows: Rows) -> None:
    for split in SPLITS:
        for row in rows[split]:
            assert all(value and value.isascii() for value in row.values())
            assert 4 <= len(row["response"].split()) <= 20
            assert row["response"].endswith(".")
            assert row["response"][0].isupper()
            assert not set("`*<>{}%=:\n") & set(row["response"])
            assert row["prompt"].endswith(':\n    """') or row["prompt"].endswith(':\n        """')
            assert len(row["prompt"]) <= 200


def test_notice_names_every_package_with_its_licence(rows: Rows) -> None:
    text = (DOCSTRINGS / "NOTICE").read_text(encoding="ascii")
    counts = Counter((r["package"], r["version"], r["licence"]) for split in SPLITS for r in rows[split])
    assert {licence for _, _, licence in counts} <= LICENCES
    for (package, version, licence), count in counts.items():
        assert f"\n{package} {version} | {licence} | {count} rows\n    " in text
    for licence in {licence for _, _, licence in counts}:
        assert f"\n==================== {licence}, as " in text


FOLDER = Path(sheeprlhf.assets.__file__).parent / "tiny"
ODD_TEXTS = [
    "",
    " ",
    "a ",
    "  two  spaces  ",
    "tab\tand\r\nline\n\n\n  end\n",
    'class Owner:\n    def name(self, x=12):\n        """',
    "\u00e9\u00df\u4e2d\u6587\U0001f600\u200b\u00a0x",
    "\x00\x01\x7f",
    "1234567890 3.14 0x1F",
    "don't , . ! ?",
    "e\u0301 \ufeff",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_size_and_special_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 4096
    assert sorted(tokenizer.get_vocab().values()) == list(range(4096))
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|bos|>", "<|eos|>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 512


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_one_bos_first_and_no_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert 2 not in ids
    assert 1 not in tokenizer.encode(text, add_special_tokens=False)


def test_digits_are_single_and_indentation_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer.encode("12345", add_special_tokens=False)) == 5
    for width in (4, 8, 12):
        assert len(tokenizer.encode(" " * width + "return", add_special_tokens=False)) == 2


def test_prompt_and_response_tokenize_the_same_apart_and_together(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = 'def f(x):\n    """', "Return the value."
    apart = tokenizer.encode(prompt) + tokenizer.encode(response, add_special_tokens=False)
    assert tokenizer.encode(prompt + response) == apart


WARM = Sampled(1.0, 0.96, 0.97, 9000, ["sometric", "gle"])
COOL = Sampled(0.7, 0.98, 0.99, 8000, ["gle"])
SEED = Seed(1.4, 30.0, 23.0, 21.7, [WARM, COOL], 0.972, 0.986)


def warmer(known: float) -> Seed:
    return SEED._replace(sampled=[WARM._replace(known=known), COOL])


def test_words_by_hand() -> None:
    english = frozenset({"return", "the", "of", "don't", "size", "frame"})
    found = words_of("Return max_len2 of the x's DataFrame; don't.")
    assert " ".join(found) == "return max len of the x's dataframe don't"
    assert unknown_words("Return the frame's sizze. Don't!", "def f():", english) == ["sizze"]
    assert unknown_words("Return dataframe, data, HTTP of readers.", "def read_HTTPData(DataFrame)", english) == [
        "readers"
    ]


def test_a_gate_is_of_the_mean_over_the_seeds() -> None:
    def passed(*seeds: Seed) -> list[bool]:
        return [gate.passed for gate in gates(list(seeds))]

    assert passed(SEED, SEED) == [True, True, True, True]
    assert passed(SEED, SEED._replace(bits_per_character=1.61)) == [False, True, True, True]  # mean 1.505
    assert passed(SEED, SEED._replace(bits_per_character=1.59)) == [True, True, True, True]
    assert passed(warmer(0.9499)) == [True, False, True, True]
    assert passed(SEED._replace(sampled=[WARM, COOL._replace(known=0.9499)])) == [True, True, False, True]
    assert passed(SEED._replace(rouge_l=21.7)) == [True, True, True, False]  # above, not equal
    assert gates([]) == []
