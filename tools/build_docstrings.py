"""Build the docstring snapshot and, optionally, a pretraining corpus from installed packages.

The standard library and the distributions of each site-packages folder are read with ``ast``; nothing is imported.
Those with a recognised permissive licence give pairs of a signature and its one-sentence summary. The snapshot's rows
carry each summary in the imperative (``chosen``) and in the third person (``rejected``).

Usage: ``python -m tools.build_docstrings --site-packages DIR --output DIR [--corpus DIR]``
"""

import argparse
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sheeprlhf.reward.inflect import style_of
from sheeprlhf.utils.home import embedded_folder
from tools.docstring_card import notice, readme
from tools.docstring_pairs import paragraphs, short_function, summary, walk
from tools.docstring_splits import (
    SPLITS,
    Pair,
    assign_packages,
    balance,
    corpus_rows,
    deduplicate,
    is_comparable,
)
from tools.inflect import to_imperative, to_third_person
from tools.licences import Distribution, copyright_lines, read_distribution, recognise, refused

COLUMNS = (
    *("prompt", "response", "chosen", "rejected", "style"),
    *("package", "version", "file", "qualname", "licence"),
)
_SKIPPED = """
    _external _vendor _vendored ensurepip extern externals lib2to3 site-packages test testing tests third_party
    thirdparty thirdparty_files vendor vendored vendored_packages
"""
SKIPPED_FOLDERS = frozenset(_SKIPPED.split())


@dataclass
class Scan:
    """Result of the search in all distributions.

    Attributes:
        pairs: Clean pairs, in no particular order.
        bodies: Corpus rows per package: (prompt, response) of docstring bodies and of short functions.
    """

    pairs: list[Pair] = field(default_factory=list)
    bodies: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def standard_library() -> Distribution:
    """Return the running interpreter's standard library as a distribution named ``python``.

    Returns:
        The distribution, its licence read from the library's own licence file.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    licence_file = root / "LICENSE.txt"
    text = licence_file.read_text(encoding="utf-8") if licence_file.exists() else ""
    files = tuple(sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")))
    licence = recognise(text) or ""
    reason = "" if licence else "licence file missing or not recognised"
    return Distribution("python", platform.python_version(), files, root, licence, reason, copyright_lines(text), text)


def distributions(site_packages: Sequence[Path]) -> list[Distribution]:
    """Return the standard library and the distributions of the folders, the first of each name.

    Args:
        site_packages: The site-packages folders.

    Returns:
        All of them, sorted by name, with and without a usable licence.

    Raises:
        FileNotFoundError: If a folder holds no distribution.
    """
    found = {"python": standard_library()}
    for folder in site_packages:
        infos = sorted(folder.glob("*.dist-info"))
        if not infos:
            raise FileNotFoundError(
                f"--site-packages {folder} has no *.dist-info; give a folder that pip installs into"
            )
        for info in infos:
            distribution = read_distribution(info)
            found.setdefault(distribution.name, distribution)
    return [found[name] for name in sorted(found)]


def is_source(path: str) -> bool:
    """Say whether a Python file is part of the package proper, and not a test or a vendored copy.

    Args:
        path: Path inside the site-packages or library folder.

    Returns:
        False for test modules and for folders of other projects' code.
    """
    *folders, name = path.split("/")
    is_test = name.startswith(("test_", "conftest")) or name.endswith(("_test.py", "_tests.py"))
    return not is_test and SKIPPED_FOLDERS.isdisjoint(folders) and not any(part.endswith("_tests") for part in folders)


def scan(sources: Iterable[Distribution]) -> Scan:
    """Read every source file of the distributions.

    Args:
        sources: Distributions with a licence.

    Returns:
        The clean pairs and the corpus rows. A file that is not UTF-8, is not Python of the running interpreter or names
        a refused licence in its first 3,000 characters is passed over.
    """
    result = Scan()
    for source in sources:
        bodies = result.bodies.setdefault(source.name, [])
        for file in filter(is_source, source.files):
            for pair, rows in _read_file(source, file):
                result.pairs.extend(pair)
                bodies.extend(rows)
    return result


def _read_file(source: Distribution, file: str) -> Iterator[tuple[list[Pair], list[tuple[str, str]]]]:
    try:
        text = (source.root / file).read_text(encoding="utf-8")
        entries = [] if refused(text[:3000]) else list(walk(text))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    for entry in entries:
        sentence = summary(entry.docstring)
        where = (source.name, source.version, file, entry.qualname, source.licence)
        pairs = [Pair(entry.prompt, sentence, *where)] if sentence else []
        body = paragraphs(entry.docstring)
        code = short_function(entry)
        yield pairs, ([(entry.prompt, body)] if body else []) + ([code] if code else [])


def snapshot_row(pair: Pair) -> dict[str, str]:
    """Return a pair as a row of the snapshot.

    Args:
        pair: A comparable pair.

    Returns:
        The row, with the keys of `COLUMNS`.

    Raises:
        ValueError: If the summary's first word is no verb of the list.
    """
    chosen, rejected = to_imperative(pair.response), to_third_person(pair.response)
    if chosen is None or rejected is None:
        raise ValueError(f"response={pair.response!r} begins with no listed verb; filter with is_comparable first")
    values = {**vars(pair), "chosen": chosen, "rejected": rejected, "style": style_of(pair.response)}
    return {column: values[column] for column in COLUMNS}


def write_parquet(rows: list[dict[str, str]], path: Path) -> None:
    """Write rows as one zstd-compressed parquet file.

    Args:
        rows: At least one row; all have the same keys.
        path: The file to write.
    """
    table = pa.Table.from_pylist(rows)
    repeated = [name for name in ("style", "package", "version", "licence") if name in table.column_names]
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=repeated,
        write_statistics=False,
        data_page_size=1 << 24,
        write_batch_size=1 << 20,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the snapshot, its notice and its card, and the corpus when asked for.

    Args:
        arguments: Command line; that of the process when None.
    """
    args = _parser().parse_args(arguments)
    warnings.simplefilter("ignore", SyntaxWarning)
    found = distributions(args.site_packages)
    usable = [source for source in found if source.licence]
    scanned = scan(usable)
    pairs = deduplicate(scanned.pairs, args.seed)
    comparable = [pair for pair in pairs if is_comparable(pair)]
    splits = assign_packages(comparable, args.seed, args.held_out_rows, (args.min_package_rows, args.max_package_rows))
    limits = {"train": args.train_rows, "validation": args.held_out_rows, "test": args.held_out_rows}
    drawn = {
        split: balance(
            [pair for pair in comparable if splits[pair.package] == split], limits[split], args.package_limit
        )
        for split in SPLITS
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        write_parquet([snapshot_row(pair) for pair in drawn[split]], args.output / f"{split}.parquet")
    (args.output / "NOTICE").write_text(notice(usable, drawn), encoding="ascii")
    (args.output / "README.md").write_text(readme(usable, drawn), encoding="ascii")
    for source in found:
        if source.reason:
            print(f"skipped {source.name} {source.version}: {source.reason}")
    print({split: len(rows) for split, rows in drawn.items()})
    if args.corpus is None:
        return
    args.corpus.mkdir(parents=True, exist_ok=True)
    for split, limit in (("train", args.corpus_chars), ("validation", args.corpus_chars // 10)):
        # A package without a comparable pair is in no split: it may only be trained on.
        names = {source.name for source in usable if splits.get(source.name, "train") == split}
        bodies = [row for name in sorted(names) for row in scanned.bodies[name]]
        rows = corpus_rows([pair for pair in pairs if pair.package in names], bodies, args.seed, limit)
        rows = rows if split == "train" else rows[:1000]
        write_parquet(rows, args.corpus / f"{split}.parquet")
        print(split, len(rows), "corpus rows,", sum(len(row["prompt"]) + len(row["response"]) for row in rows), "chars")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.build_docstrings", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--site-packages", type=Path, action="append", default=[], help="folder to read; repeatable")
    parser.add_argument("--output", type=Path, default=embedded_folder("docstrings"), help="snapshot folder")
    parser.add_argument("--corpus", type=Path, help="also write a pretraining corpus to this folder")
    parser.add_argument("--corpus-chars", type=int, default=25_000_000, help="most characters of the training corpus")
    parser.add_argument("--train-rows", type=int, default=20_000, help="most rows of the training split")
    parser.add_argument("--held-out-rows", type=int, default=1_250, help="rows of the validation and of the test split")
    parser.add_argument("--min-package-rows", type=int, default=40, help="least balanced rows of a held-out family")
    parser.add_argument("--max-package-rows", type=int, default=700, help="most rows of a held-out family")
    parser.add_argument("--package-limit", type=int, default=1_750, help="most rows of a style from one package")
    parser.add_argument("--seed", type=int, default=1, help="seed of the hash order")
    return parser


if __name__ == "__main__":
    main()
