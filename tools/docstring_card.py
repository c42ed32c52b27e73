"""The notice and the data card of the docstring snapshot."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sheeprlhf.reward.inflect import style_of
from tools.docstring_splits import Pair
from tools.licences import Distribution, to_ascii

_CARD = """\
# Docstring summaries in two styles

{total} functions and methods of {packages} permissively licensed Python packages, each with the one-sentence
summary its author wrote, and that summary in the imperative ("Return the value.") and in the third person ("Returns
the value."). PEP 257 asks for the imperative: it is `chosen`, the third person is `rejected`. Authors of both kinds are
equally many.

| split | rows | imperative authors | third-person authors | packages |
| --- | --- | --- | --- | --- |
{splits}

## Columns
- `prompt`: the source up to the docstring's opening quotes; a method stands under `class Owner:`.
- `response`: the summary as its author wrote it, without quotes.
- `chosen`, `rejected`: the imperative and the third-person form; they differ in their first word only.
- `style`: `imperative` or `third_person`, what the author wrote (`response` equals `chosen` or `rejected`).
- `package`, `version`, `file`, `qualname`, `licence`: where the row is from; `licence` is an SPDX id.

## Rules
- Read with `ast`, never imported. Test modules and vendored copies of other projects are passed over.
- A package is used only if its own licence file reads as MIT, BSD-2-Clause, BSD-3-Clause, Apache-2.0, PSF-2.0, ISC or
  zlib, and its metadata does not say otherwise. `NOTICE` names each package with its copyright lines and rows.
- A summary is a docstring's whole first paragraph: one ASCII sentence of 4 to 20 words, a capital letter first, a
  period last, no markup, links, colons or code. Prompts are ASCII and at most 200 characters long.
- The first word is a verb of the closed list in `inflect.py`. Sentences with a second verb to inflect ("Parse the file
  and return ...") and classes are left out.
- No two rows share a normalised prompt or a normalised summary, within or between splits; of duplicates the
  third-person author, the rarer kind, is kept.
- The splits share no package, and packages that share text (a family) stay together; the standard library is one
  package.

## Packages
{tables}

## Rebuild
Install the packages named in `NOTICE`, then
`python -m tools.build_docstrings --site-packages DIR --output DIR`; `--help` lists the limits. The same
packages and interpreter give the same rows.

## Limits
- Only the first word tells the two forms apart: a model can learn the preference from it alone.
- Style goes with package: most third-person authors are of a few large projects.
- A verb's inflection is by rule; a noun that reads like a verb may have passed. Summaries are not checked to be true.
"""

_NOTICE = """\
The rows of train.parquet, validation.parquet and test.parquet are one-line summaries and signatures copied from the
packages below, each under its own licence. Per package: version, SPDX licence id, number of rows, and the copyright
lines found in its licence and notice files. The licence texts follow at the end."""


def notice(sources: Iterable[Distribution], drawn: Mapping[str, Sequence[Pair]]) -> str:
    """Return the notice: every package with its licence and copyright lines, then each licence's text once.

    Args:
        sources: The distributions with a licence.
        drawn: The rows of each split.

    Returns:
        ASCII text.
    """
    counts = Counter(pair.package for pairs in drawn.values() for pair in pairs)
    used = [source for source in sources if counts[source.name]]
    parts = [_NOTICE]
    for source in used:
        lines = source.copyrights or (
            f"Copyright the authors of {source.name} (no copyright line in its licence file)",
        )
        head = f"{source.name} {source.version} | {source.licence} | {counts[source.name]} rows"
        parts.append("\n".join([head, *(f"    {line}" for line in lines)]))
    for licence in sorted({source.licence for source in used}):
        shortest = min((source for source in used if source.licence == licence), key=lambda s: (len(s.text), s.name))
        text = "\n".join(line.rstrip() for line in to_ascii(shortest.text).strip("\n").splitlines())
        parts.append(f"{'=' * 20} {licence}, as {shortest.name} gives it {'=' * 20}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def readme(sources: Iterable[Distribution], drawn: Mapping[str, Sequence[Pair]]) -> str:
    """Return the data card.

    Args:
        sources: The distributions with a licence.
        drawn: The rows of each split.

    Returns:
        ASCII Markdown.
    """
    versions = {source.name: source.version for source in sources}
    rows, tables = [], []
    for split, pairs in drawn.items():
        styles = Counter(style_of(pair.response) for pair in pairs)
        counts = Counter(pair.package for pair in pairs)
        rows.append(f"| {split} | {len(pairs)} | {styles['imperative']} | {styles['third_person']} | {len(counts)} |")
        named = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        tables.append(f"- {split}: " + ", ".join(f"{name} {versions[name]} ({count})" for name, count in named))
    return _CARD.format(
        total=sum(len(pairs) for pairs in drawn.values()),
        packages=len({pair.package for pairs in drawn.values() for pair in pairs}),
        splits="\n".join(rows),
        tables="\n".join(tables),
    )
