"""Read the licence of an installed distribution from its licence file, with its metadata as a cross check."""

import csv
import re
import unicodedata
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

ALLOWED = frozenset({"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "PSF-2.0", "Zlib"})

_MIT = (
    "permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated doc"
)
_BSD = "redistribution and use in source and binary forms, with or without modification, are permitted provided that"
_ISC = "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby"
_SENTENCES = {
    "MIT": (_MIT, "the above copyright notice and this permission notice"),
    "BSD": (_BSD, "redistributions in binary form must reproduce"),
    "ISC": (_ISC, "provided that the above copyright notice"),
    "Apache-2.0": ("version 2.0, january 2004", "terms and conditions for use, reproduction, and distribution"),
    "PSF-2.0": ("python software foundation license version 2", "psf is making python available"),
    "Zlib": ("without any express or implied warranty", "altered source versions must be plainly marked as such"),
}
_REFUSED = (
    "gnu general public license",
    "gnu lesser general public license",
    "gnu affero general public license",
    "mozilla public license",
    "eclipse public license",
    "business source license",
    "creative commons",
)
_METADATA_WORDS = {
    "MIT": ("mit",),
    "BSD-2-Clause": ("bsd",),
    "BSD-3-Clause": ("bsd",),
    "ISC": ("isc",),
    "Apache-2.0": ("apache",),
    "PSF-2.0": ("psf", "python software foundation", "python-2.0"),
    "Zlib": ("zlib",),
}
_REFUSED_METADATA = re.compile(r"\b(?:a?gpl|lgpl|mpl|cnri|epl|general public|mozilla)", re.IGNORECASE)
_COPYRIGHT = re.compile(r"copyright\s*(?:\(c\)|\u00a9|:)*\s*(?:\(c\)\s*)?(?:by\b|[12]\d{3}|[A-Z])", re.IGNORECASE)
_NOT_COPYRIGHT = re.compile(
    r"copyright (?:notice|licen[cs]e|owner|holder|statement|and|law|in|is|or|of"
    r"|interest|disclaimer|doctrines|policy|model|\[|\{)",
    re.IGNORECASE,
)
MAX_COPYRIGHT_LINES = 12


@dataclass(frozen=True)
class Distribution:
    """One installed distribution and what its own files say about its licence.

    Attributes:
        name: Normalised distribution name.
        version: Version as in its metadata.
        files: Paths of its Python files, relative to `root`, sorted.
        root: The site-packages folder.
        licence: SPDX id, or an empty string when none was recognised.
        reason: Why it has no usable licence; empty when it has one.
        copyrights: The copyright lines of its licence and notice files.
        text: The licence file's text.
    """

    name: str
    version: str
    files: tuple[str, ...]
    root: Path
    licence: str
    reason: str
    copyrights: tuple[str, ...]
    text: str


def to_ascii(text: str) -> str:
    """Return a text in ASCII: accents are dropped, the copyright sign becomes ``(c)``, other characters ``?``.

    Args:
        text: Any text.

    Returns:
        The nearest ASCII text.
    """
    for mark, plain in {"\u00a9": "(c)", "\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"}.items():
        text = text.replace(mark, plain)
    folded = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return folded.encode("ascii", "replace").decode("ascii")


def recognise(text: str) -> str | None:
    """Return the SPDX id of the licence that a licence file begins with.

    Args:
        text: Text of a licence file; bundled licences may follow the main one.

    Returns:
        An id of `ALLOWED`, or None when no characteristic sentence is found or a copyleft licence comes first.
    """
    flat = re.sub(r"[^a-z0-9.,/-]+", " ", text.lower())
    found = [(flat.find(_flat(first)), spdx) for spdx, (first, also) in _SENTENCES.items() if _flat(also) in flat]
    found = sorted(pair for pair in found if pair[0] >= 0)
    if not found or refused(flat[: found[0][0]]):
        return None
    position, spdx = found[0]
    if spdx != "BSD":
        return spdx
    clauses = flat[position : position + 2000]
    if "all advertising materials" in clauses:
        return None
    return "BSD-3-Clause" if re.search(r"endorse or promote products", clauses) else "BSD-2-Clause"


def refused(text: str) -> bool:
    """Say whether a text names a copyleft, content or source-available licence in full.

    Args:
        text: A licence file, or the head of a source file.

    Returns:
        True if one of the names occurs.
    """
    flat = " ".join(text.lower().split())
    return any(name in flat for name in _REFUSED)


def metadata_agrees(licence: str, declared: str) -> bool:
    """Say whether the metadata's licence fields agree with the licence that was read.

    Args:
        licence: SPDX id read from the licence file.
        declared: The metadata's licence expression, classifiers or licence field; may be empty.

    Returns:
        True if the metadata is silent, or names the same licence and none that is refused (unless joined by OR).
    """
    if not declared.strip():
        return True
    if _REFUSED_METADATA.search(declared) and " or " not in declared.lower():
        return False
    return any(re.search(rf"\b{re.escape(word)}", declared.lower()) for word in _METADATA_WORDS[licence])


def copyright_lines(text: str) -> tuple[str, ...]:
    """Return the first copyright lines of a licence or notice file, in ASCII and without repetition.

    Args:
        text: The file's text.

    Returns:
        At most twelve lines.
    """
    joined = re.sub(r"((?:[12]\d{3}, *)+)\n *(?=[12]\d{3})", r"\1 ", text)
    stripped = [to_ascii(line).strip(" \t#*/.,;-\"'").removeprefix('i.e., "') for line in joined.splitlines()]
    lines = [" ".join(line.split()) for line in stripped]
    kept = [line for line in lines if _COPYRIGHT.search(line) and not _NOT_COPYRIGHT.search(line)]
    return tuple(dict.fromkeys(kept))[:MAX_COPYRIGHT_LINES]


def read_distribution(dist_info: Path) -> Distribution:
    """Read an installed distribution's name, version, Python files and licence.

    Args:
        dist_info: Its ``*.dist-info`` folder.

    Returns:
        The distribution; `licence` is empty and `reason` says why when it can not be used.
    """
    root = dist_info.parent
    head = HeaderParser().parsestr((dist_info / "METADATA").read_text(encoding="utf-8", errors="replace"))
    name = re.sub(r"[-_.]+", "-", head["Name"]).lower()
    record = dist_info / "RECORD"
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    paths = sorted(row[0] for row in csv.reader(lines) if row and not row[0].startswith(("..", "/")))
    files = tuple(path for path in paths if path.endswith(".py"))
    texts = [_read(root / path) for path in _licence_paths(paths, dist_info.name)]
    found = [(spdx, text) for text in texts if (spdx := recognise(text)) in ALLOWED]
    notices = [_read(root / path) for path in paths if re.fullmatch(r"[^/]+/(?:licenses/)?NOTICE(?:\.\w+)?", path)]
    declared = _declared(head.get_all("License-Expression"), head.get_all("Classifier"), head.get("License"))
    licence, text, reason = "", "", ""
    if not texts:
        reason = "no licence file"
    elif not found or any(refused(text) and recognise(text) is None for text in texts):
        reason = "licence file not recognised"
    elif not metadata_agrees(str(found[0][0]), declared):
        reason = f"licence file reads {found[0][0]}, metadata says {to_ascii(declared)[:80]!r}"
    else:
        licence, text = str(found[0][0]), found[0][1]
    copyrights = copyright_lines("\n".join([*(text for _, text in found), *notices]))
    return Distribution(name, head["Version"], files, root, licence, reason, copyrights, text)


def _flat(sentence: str) -> str:
    return re.sub(r"[^a-z0-9.,/-]+", " ", sentence)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _licence_paths(paths: list[str], dist_info: str) -> list[str]:
    named = [path for path in paths if re.match(r"(?:licen[cs]e|copying)", PurePosixPath(path).name, re.IGNORECASE)]
    named = [path for path in named if not path.endswith((".py", ".pyc", ".pyi"))]
    own = {dist_info, f"{dist_info}/licenses", f"{dist_info}/license_files"}
    inside = [path for path in named if str(PurePosixPath(path).parent) in own]
    return inside or [path for path in named if re.fullmatch(r"\w+/(?:include/)?[^/]+", path)]


def _declared(expression: list[str] | None, classifiers: list[str] | None, field: str | None) -> str:
    if expression:
        return " ".join(expression)
    licences = [line.split("::")[-1].strip() for line in classifiers or [] if line.startswith("License ::")]
    licences = [line for line in licences if line != "OSI Approved"]
    return " ".join(licences) or (field or "")[:200]
