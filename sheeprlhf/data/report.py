"""Data report: rows read, kept, dropped and cut by reason, and the lengths of the kept rows."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sheeprlhf.data.rows import printable
from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.data.tokenize import REFUSED, TokenRow
from sheeprlhf.structure.data import DataConfig, LayoutDataConfig
from sheeprlhf.utils.end_tokens import end_tokens
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.rendering import CLOCK
from sheeprlhf.utils.vocabulary import missing_tokens

SPLITS = ("train", "reward", "validation", "test")
PERCENTILES = {"p5": 5, "p50": 50, "p95": 95, "max": 100}
DUPLICATE = "duplicate"
MANY_CUT = 0.05  # of the rows of a split: from here on a note tells that they are cut

Report = dict[str, Any]


_NUMBERS = (  # of rows, unless the name tells another thing
    *("read", "kept", "rows_cut", "duplicates", "special_token_rows", "responses", "ended_responses"),
    "repeated_prompt_rows",
    *("rows_with_margin", "templated_rows", "text_rows", "text_parts", "prompt_mismatch_rows"),
    *("response_mismatch_rows", "untrained_answers", "further_answers", "joined_answers"),
)


class SplitCount:
    """Counts of one split while its rows are prepared, under the names that they have in the report."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.numbers = Counter(dict.fromkeys(_NUMBERS, 0))
        self.dropped: Counter[str] = Counter()
        self.first_dropped: dict[str, str] = {}
        self.truncated = Counter(prompt=0, response=0)
        self.labels = Counter(desirable=0, undesirable=0, pairs=0)
        self.remarks: Counter[str] = Counter()
        self.further_texts = 0

    def add(self, row: TokenRow, dropped: str | None, duplicate: bool) -> None:
        """Count one row; `dropped` is the reason why it is left out."""
        is_answer = row.is_further and not row.is_text
        self._add(read=not row.is_further, further_answers=is_answer, duplicates=duplicate)
        self.further_texts += row.is_further and row.is_text
        if dropped is not None:
            self.dropped[dropped] += 1
            if row.detail:
                self.first_dropped.setdefault(dropped, row.detail)
            return
        self._add(
            kept=1,
            rows_cut=bool(row.cut),
            special_token_rows=row.special_text,
            repeated_prompt_rows=row.repeats_prompt,
            responses=len(row.sizes) - 1,
            ended_responses=row.num_eos,
            rows_with_margin=row.margin != 0.0,
            templated_rows=row.templated,
            text_rows=row.is_text,
            text_parts=row.is_text and row.is_further,
            untrained_answers=row.untrained,
            joined_answers=row.num_joined,
        )
        if row.mismatch:
            self.numbers[f"{row.mismatch}_mismatch_rows"] += 1
        for part in row.cut:
            self.truncated[part] += 1
        for label in row.desirable:
            self.labels["desirable" if label else "undesirable"] += 1
        self.labels["pairs"] += len(row.desirable) == 2
        for remark in row.remarks:
            self.remarks[remark] += 1

    def _add(self, **numbers: int) -> None:
        """Add to the numbers; `Counter.update` takes several times as long."""
        for name, number in numbers.items():
            if number:
                self.numbers[name] += number

    def report(self, split: TokenizedSplit | None) -> Report:
        """The split's part of the report; `split` is None if no row was kept."""
        numbers = self.numbers
        seen = numbers["read"] + numbers["further_answers"] + self.further_texts
        stored = numbers["kept"] + self.labels["pairs"]  # a pair of unpaired data becomes two rows
        if numbers["kept"] + sum(self.dropped.values()) != seen or (len(split) if split else 0) != stored:
            raise AssertionError("rows are neither kept nor counted as dropped: this is a bug")
        part: Report = {
            **numbers,
            "dropped": dict(sorted(self.dropped.items())),
            "first_dropped": dict(sorted(self.first_dropped.items())),
            "truncated": dict(self.truncated),
            "eos_share": numbers["ended_responses"] / numbers["responses"] if numbers["responses"] else None,
            "remarks": dict(sorted(self.remarks.items())),
        }
        if any(self.labels.values()):
            part["labels"] = dict(self.labels)
        return part | measure(split)


def measure(split: TokenizedSplit | None) -> Report:
    """The part of a split's report that its stored rows tell; None is a split without rows."""
    if split is None:
        return {"pairs": 0, "trained_tokens": 0, "tokens": {}}
    there = split.sizes[:, 1:] >= 0
    responses, of_row = split.sizes[:, 1:][there], there.sum(axis=1, dtype=np.int64)
    return {
        "pairs": int((of_row * (of_row - 1) // 2).sum()),
        "trained_tokens": int(responses.sum(dtype=np.int64)) - split.num_untrained(),
        "tokens": {
            "prompt": _percentiles(split.sizes[:, 0]),
            **({"response": _percentiles(responses)} if len(responses) else {}),
            "total": _percentiles(split.lengths),
        },
        **({"prompts_alone": split.unanswered} if split.unanswered else {}),
    }


def check_refused(counts: Mapping[str, SplitCount], at_least: int = 1) -> None:
    """Raise DataError if the chat template refuses most rows, as soon as `at_least` rows have been read."""
    refused = sum(count.dropped[REFUSED] for count in counts.values())
    read = sum(count.numbers["read"] for count in counts.values())
    if read >= at_least and 2 * refused > read:
        first = next(count.first_dropped[REFUSED] for count in counts.values() if REFUSED in count.first_dropped)
        raise DataError(f"{first} ({refused} of {read} rows are refused; up to half of them would be left out)")


def check_targets(name: str, split: TokenizedSplit, cfg: DataConfig) -> None:
    """Raise DataError if a row has no targets: its loss would be a division by zero, or another row's."""
    empty = np.flatnonzero((split.sizes[:, 1:] == 0).any(axis=1))
    if not len(empty):
        return
    first = int(empty[0])
    row, prompt = split.example(first).row_id, int(split.sizes[first, 0])
    why = (
        f"its prompt of {prompt} tokens leaves no room for one in data.max_length={cfg.max_length}"
        if prompt >= cfg.max_length
        else f"it was cut to nothing behind a prompt of {prompt} tokens (data.max_length={cfg.max_length})"
    )
    others = f" (one of {len(empty)} such rows)" if len(empty) > 1 else ""
    raise DataError(
        f"row {row} of the {name} split has no token to train on{others}: its response is empty, for {why}; raise "
        "data.max_length, lower data.max_prompt_length, or set data.on_overflow=drop"
    )


def check_ids(name: str, split: TokenizedSplit, largest_id: int) -> None:
    """Refuse rows with a token id that the tokenizer does not define. Raises DataError if there is such an id."""
    found = split.largest_id()
    if found > largest_id:
        raise DataError(
            f"the {name} split has token id {found}, and the tokenizer's largest is {largest_id}: {split.file} is not "
            f"of this tokenizer; delete the folder {split.file.parent} and start again"
        )


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths that 5, 50, 95 and 100 percent of the rows do not exceed."""
    values = np.percentile(lengths, list(PERCENTILES.values()), method="inverted_cdf")
    return dict(zip(PERCENTILES, map(int, values), strict=True))


def why_none_left(report: Report, native: set[str], cfg: DataConfig) -> str:
    """A sentence on where the training rows went; splits that are not `native` were cut from them."""
    parts = {name: part for name, part in report["splits"].items() if name == "train" or name not in native}
    dropped: Counter[str] = Counter()
    for part in parts.values():
        dropped.update(part["dropped"])
    fixes = {
        "empty_prompt": "write the prompts",
        "empty_response": "write the responses",
        "too_short": f"lower data.minimum_response_length={cfg.minimum_response_length}",
        "too_long": f"raise data.max_length={cfg.max_length}, or set data.on_overflow=truncate_prompt",
        "no_room_for_response": f"raise data.max_length={cfg.max_length}, or lower data.max_prompt_length="
        f"{cfg.max_prompt_length}",
        "same_responses": f"give pairs that differ in their first data.max_length={cfg.max_length} tokens",
        "nul_character": "remove the NUL characters",
        "no_trained_message": "mark an assistant message as one to learn: weight 1 or train true",
        "reasoning_alone": "set data.reasoning=train, or raise data.max_length",
        "steps_without_border": "choose a data.step_separator that no step contains and no token joins to a next step",
        "equal_ranks": "rank the responses without ties",
        "more_than_one_answer": "chosen and rejected may differ in the last message only",
        "special_tokens_in_messages": "take the markers of the chat template out of the messages",
    }
    went = [f"{rows} {reason.replace('_', ' ')}" + _in_brackets(fixes.get(reason)) for reason, rows in dropped.items()]
    options = {"validation": "validation_split", "test": "test_split", "reward": "reward_model_split"}
    for name, option in options.items():
        if name in parts and parts[name]["kept"]:
            went.append(f"{parts[name]['kept']} to the {name} split" + _in_brackets(f"lower data.{option}"))
    return f"no training row is left of {sum(part['read'] for part in parts.values())}: {', '.join(went)}"


def _in_brackets(advice: str | None) -> str:
    return f" ({advice})" if advice else ""


def render_report(report: Report) -> str:
    """The report as a table of plain text, one column for each split."""
    splits = {name: report["splits"][name] for name in SPLITS if name in report["splits"]}
    rows: list[tuple[str, list[str]]] = [("", list(splits))]

    def line(label: str, values: list[Any]) -> None:
        rows.append((label, ["-" if value is None else f"{value:,}" for value in values]))

    parts = list(splits.values())
    line("rows read", [part["read"] for part in parts])
    line("rows kept", [part["kept"] for part in parts])
    if "mix" in report:
        line("rows of the mixture", [part["mixed_rows"] for part in parts])
    for reason in sorted({reason for part in parts for reason in part["dropped"]}):
        line(f"  dropped: {reason.replace('_', ' ')}", [part["dropped"].get(reason, 0) for part in parts])
    for kind in ("prompt", "response"):
        if any(part["truncated"][kind] for part in parts):
            line(f"  {kind} cut", [part["truncated"][kind] for part in parts])
    labels = {
        "prompts_alone": "rows without a response",
        "pairs": "pairs of a better and a worse response",
        "rows_with_margin": "rows with a margin (task=rm) or a reward (task=ilql)",
        "templated_rows": "rows in the chat template",
        "text_rows": "texts without a prompt (all tokens are learned)",
        "text_parts": "further parts of longer texts (data.max_length)",
        "untrained_answers": "assistant messages that are not trained on (data.train_on)",
        "joined_answers": "further answers of these rows, in the same example",
        "further_answers": "further answers of these rows, each an example of its own",
        "duplicates": "duplicate rows",
        "special_token_rows": "rows with special-token text",
        "prompt_mismatch_rows": "rows whose prompt is not what its tokens decode to",
        "response_mismatch_rows": "rows whose response is not what its tokens decode to",
    }
    for key, label in labels.items():
        if any(part.get(key) for part in parts):
            line(label, [part.get(key, 0) for part in parts])
    for remark in sorted({remark for part in parts for remark in part["remarks"]}):
        line(remark, [part["remarks"].get(remark, 0) for part in parts])
    if any("labels" in part for part in parts):
        for name in ("desirable", "undesirable"):
            line(f"{name} examples", [part.get("labels", {}).get(name, 0) for part in parts])
    shares = [part["eos_share"] for part in parts]
    if answered := any(share is not None for share in shares):
        rows.append(("targets with an end token", ["-" if share is None else f"{share:.1%}" for share in shares]))
        line("tokens to learn", [part["trained_tokens"] for part in parts])
    for what in ("prompt", "response", "total") if answered else ("prompt",):
        values = [part["tokens"].get(what) for part in parts]
        cells = ["-" if v is None else " ".join(str(v[p]) for p in PERCENTILES) for v in values]
        rows.append((f"{what} tokens {'/'.join(PERCENTILES)}", cells))
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(parts))]
    first = max(len(label) for label, _ in rows)
    table = [
        f"{label:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in rows
    ]
    lines = [*(t.rstrip() for t in table), *_dropped_lines(parts), *_mix_lines(report), *_column_lines(report)]
    lines += report["notes"]
    return "\n".join([f"data: {report['name']} ({report['kind']})", *lines])


def _dropped_lines(parts: list[Report]) -> list[str]:
    """The first row that was dropped for each reason."""
    first: dict[str, str] = {}
    for part in parts:
        first = part.get("first_dropped", {}) | first
    return [f"first row dropped as {reason.replace('_', ' ')}: {first[reason]}" for reason in sorted(first)]


def _mix_lines(report: Report) -> list[str]:
    """The datasets of a mixture, each with the rows that it gives and its columns."""
    lines = []
    for number, part in enumerate(report.get("mix", []), 1):
        weight = "" if part["weight"] is None else f", weight {part['weight']:g}"
        name = printable([part["name"][-40:]])
        lines.append(f"dataset {number}: {name}{weight}, its rows have the numbers from {part['first_row']:,}")
        for split, used in part["used"].items():
            kept, share = part["kept"][split], used / max(1, report["splits"][split]["mixed_rows"])
            times = "" if used == kept else f", each {used / kept:.2f} times on average"
            lines.append(f"  {split}: {used:,} rows of {kept:,}{times}: {share:.1%} of the mixture")
        lines += [f"  {line}" for line in _column_lines(part)]
    return lines


def _column_lines(report: Report) -> list[str]:
    """Columns that were read under other names, and those that were not read, each with its rows."""
    labels = {
        "layouts": "layout",
        "read_as": "columns read",
        "numbers_as_text": "whole numbers read as text",
        "not_read": "columns that are not read",
    }
    lines = []
    for key, label in labels.items():
        counts = report.get("columns", {}).get(key, {})
        parts = [
            f"{name if key in ('layouts', 'read_as') else printable([name])} ({rows:,} rows)"
            for name, rows in counts.items()
        ]
        lines += [f"{label}: {', '.join(parts)}"] if parts else []
    return lines


def available_columns(report: Report, split: str) -> list[str]:
    """Names of all columns that the source files of a split have."""
    of_files: dict[str, list[str]] = report["available_columns"]
    return of_files.get(split, of_files["train"])


def rows_kept(report: Report, split: str) -> int:
    """Rows of a split."""
    return report["splits"][split]["kept"] if split in report["splits"] else 0


def notes_on(report: Report) -> list[str]:
    """Notes for the user that the numbers do not show."""
    hints = {
        "train": "give more rows or lower data.reward_model_split",
        "validation": "nothing is validated: give more rows, a validation file or a larger data.validation_split",
        "test": "give more rows, a test file or a larger data.test_split",
    }
    notes = [f"the {split} split is empty; {hint}" for split, hint in hints.items() if not rows_kept(report, split)]
    if given := report.get("template_args"):
        values = ", ".join(f"{name}={printable([str(value)])}" for name, value in given.items())
        date = f" ({CLOCK} means today's date; data.template_args gives another)" if CLOCK in given else ""
        notes.insert(0, f"the chat template renders with {values}{date}")
    if any(part.get("labels", {}).get("pairs") for part in report["splits"].values()):
        notes.insert(0, "each pair became two examples: the chosen response desirable, the rejected one undesirable")
    return notes


def check_prompts(report: Report, task: str) -> None:
    """Raise DataError if rows are texts without a prompt, which a task cannot answer."""
    if any(part["text_rows"] for part in report["splits"].values()):
        raise DataError(f"task={task} needs prompts, and rows of this data are texts without one; give other rows")


def preparation_notes(
    report: Report, cfg: DataConfig, tokenizer: Any, frequent: Iterable[str], undesirable: int
) -> Iterator[str]:
    """Notes on rows that were cut, plain, reserved or mislabelled (`undesirable`), and on unused options."""
    yield from notes_on(report)
    kind, splits = report["kind"], report["splits"]

    def splits_with(key: str, least: float, below: float = math.inf) -> str:
        """The splits of which such a share of the rows, not 0, is counted under a key."""
        parts = {name: part for name, part in splits.items() if part[key] and least <= part[key] / part["kept"] < below}
        found = (f"{part[key]:,} of {part['kept']:,} rows of the {name} split" for name, part in parts.items())
        return ", ".join(found)

    if cut := splits_with("rows_cut", MANY_CUT):
        yield (
            f"many rows are cut to data.max_prompt_length={cfg.max_prompt_length} and data.max_length="
            f"{cfg.max_length}: {cut}; raise the limits, or leave such rows out with data.on_overflow=drop"
        )
    if isinstance(cfg, LayoutDataConfig) and (plain := splits_with("special_token_rows", 0.5)):
        advice = "if a chat template wrote these rows, give data.control_tokens=true"
        yield f"control tokens in the text of {plain} are encoded as plain text; {advice}"
    if kind != "prompts" and (repeated := splits_with("repeated_prompt_rows", 0.5)):
        yield f"the responses of {repeated} begin with their prompt; remove it from them if that is a mistake"
    if templated := splits_with("templated_rows", 0.0, below=1.0):
        fix = "give messages or a system text to all rows, or to none"
        yield f"only {templated} are in the chat template, the others are plain text; {fix}"
    if texts := splits_with("text_rows", 0.0, below=1.0):
        yield f"{texts} have an empty prompt and are learned as texts; remove them if that is a mistake"
    if (reserved := rows_kept(report, "reward")) and rows_kept(report, "train"):
        yield (
            f"{reserved:,} training rows are reserved for the reward model, and only task=rm trains on them "
            f"(data.reward_model_split={cfg.reward_model_split:g}; 0 reserves none)"
        )
    yield from frequent
    if cfg.train_on != "last" and kind != "sft":
        yield f"data.train_on={cfg.train_on} is for task=sft; this task reads the last answer of a conversation"
    if cfg.reasoning == "mask" and kind == "prompts":
        yield "data.reasoning=mask is not used: the task samples its own responses"
    elif cfg.reasoning == "mask":
        yield "reasoning is part of the context and does not count in the loss (data.reasoning=mask)"
    elif cfg.reasoning == "remove":
        yield "reasoning is removed from all assistant messages and responses (data.reasoning=remove)"
    if cfg.template_args and not any(part["templated_rows"] for part in splits.values()):
        yield "data.template_args is not used: no row went through the chat template"
    yield from notes_on_ends(tokenizer)
    if missing := missing_tokens(tokenizer):
        advice = "each is encoded as plain text; model.resize_embeddings=true adds a token for each and trains it"
        yield f"model.chat_template writes {', '.join(missing[:6])}, which the tokenizer does not define: {advice}"
    if undesirable and kind == "sft":
        fix = "where it marks them as undesirable, leave these rows out, or give task=kto, which reads it"
        yield f"{undesirable} rows have a label of false or 0, and their responses are learned like the others: {fix}"


def notes_on_ends(tokenizer: Any) -> list[str]:
    """Notes on end tokens of the model's configuration that are not used."""
    return [
        f"eos_token_id {number} of the model's configuration ends no response: the tokenizer has no such control token"
        for number in end_tokens(tokenizer).ignored
    ]
