"""`inspect`: the data as training will see it: report, examples with the mask of the loss, histograms of lengths."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from rich.text import Text

from sheeprlhf.apps.arguments import ParsedArgs
from sheeprlhf.apps.inspect.plots import draw_histograms, lengths_of, text_histogram
from sheeprlhf.apps.inspect.tokens import NEWLINE, Piece, View, Viewer, lines
from sheeprlhf.apps.terminal import Screen, columns, heading, paragraph
from sheeprlhf.config.shell import command
from sheeprlhf.data.prepare import PreparedData, prepare_data
from sheeprlhf.data.report import render_report
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.security.redaction import plain_text, redact_command, redact_text
from sheeprlhf.structure.run import InspectConfig
from sheeprlhf.structure.task import RMConfig, SFTConfig, TrainTaskConfig
from sheeprlhf.utils.errors import ConfigError, DataError
from sheeprlhf.utils.output import write_file

SIGNATURE = "sheeprlhf inspect"  # in both files: they may be replaced
_GUTTER = {True: "+ ", False: "  "}
_STYLES = {  # two shades of each, taken in turn, show where a token ends
    True: ("black on #a6e3a1", "black on #7cc97a"),
    False: ("#d0d3d9 on #3b3f46", "#d0d3d9 on #50555e"),
}
_LOOKS_AT = {  # by targets
    "response": "counts responses alone",
    "all": "counts prompts and responses (task.completion_only_loss=false)",
    "last": "compares the scores after the last token of each response",
    "scores": "compares the scores after the tokens of the responses, from the first that differs on",
}
_COMPARES = "compares the log-probabilities of whole responses"
_SPECIAL_STYLES = {True: "bold #7a0073", False: "bold #ff9df5"}


class Marks(NamedTuple):
    """Marks for characters that have no visible form."""

    newline: str
    border: str
    unfinished: str
    bar: str


def run(config: InspectConfig, args: ParsedArgs) -> int:
    """Print report, examples and lengths; leave the histograms and the report in `output_dir`.

    Raises:
        SheepError: the data cannot be trained on, the split has no rows, or a file of somebody else is in the way.
    """
    screen = Screen()
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{config.data.config_name}-{config.model.config_name}")
    files = {kind: Path(config.output_dir, f"{name}-{kind}") for kind in ("lengths.png", "data_report.json")}
    replaced = _check_files(list(files.values()))
    tokenizer = load_tokenizer(config.model)
    kind = config.task.data_kind
    data = prepare_data(config.data, tokenizer, kind=kind, say=print, progress=sys.stderr.isatty())
    _say(screen, render_report(data.report))
    first, *_ = [name for name in config.task.train_splits if name in data.splits] or config.task.train_splits
    split = config.split or first
    _check_split(split, data)

    targets = _targets(config.task)
    viewer = Viewer(tokenizer, targets=targets, template_args=config.data.template_args)
    marks = _marks(screen)
    _print_head(screen, config, data, split, targets, marks)
    rows = data.splits[split]
    for number in range(min(config.num_examples, len(rows))):
        example = rows.example(number)
        _print_example(screen, f"example {number + 1}: row {example.row_id}", viewer.view(example), marks)

    lengths = lengths_of(rows)
    _say(screen, f"\nlengths of the {split} split, {'responses' if 'better' in lengths else 'rows'} of each:")
    longest_bar = min((columns() - 12 * len(lengths)) // len(lengths), 20)
    _say(screen, "\n".join(text_histogram(lengths, bar=marks.bar, longest_bar=longest_bar)))
    title = f"Token lengths of data={config.data.config_name} with the tokenizer of model={config.model.config_name}"
    report = {"made_by": SIGNATURE, **data.report}
    _write(files["lengths.png"], draw_histograms(data.splits, config.data, title, SIGNATURE))
    _write(files["data_report.json"], json.dumps(report, indent=1).encode())
    _say(screen, "")
    for path in files.values():
        _say(screen, f"wrote {path}" + (" (in place of an earlier one)" if path in replaced else ""))
    _say(screen, f"next: {_next_command(config, args)}")
    return 0


def _check_files(paths: list[Path]) -> set[Path]:
    """The files that are there already, all ours.

    Raises:
        ConfigError: one is not.
    """
    there = {path for path in paths if os.path.lexists(path)}
    foreign = [path for path in sorted(there) if not _is_ours(path)]
    if foreign:
        names = " and ".join(str(path) for path in foreign)
        raise ConfigError(
            f"output_dir: {names} is not of an earlier inspect and will not be overwritten; give another output_dir"
        )
    return there


def _is_ours(path: Path) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    try:
        with path.open("rb") as file:
            return SIGNATURE.encode() in file.read(4096)
    except OSError:
        return False


def _write(path: Path, content: bytes) -> None:
    try:
        write_file(path.parent, path.name, content)
    except OSError as error:
        raise ConfigError(
            f"output_dir: {path} cannot be written ({error.strerror or error}); free space, or give another output_dir"
        ) from error


def _check_split(split: str, data: PreparedData) -> None:
    if split not in data.splits:
        full = ", ".join(f"{name} ({len(rows):,})" for name, rows in data.splits.items())
        raise DataError(f"split={split} has no rows; those with rows are {full}: give split={next(iter(data.splits))}")


def _say(screen: Screen, text: str) -> None:
    screen.print(plain_text(redact_text(text)))


def _marks(screen: Screen) -> Marks:
    if screen.encoding.startswith("utf"):
        return Marks("\u21b5", "\u00a6", "\u2026", "\u2588")
    return Marks("\\n", "|", "~", "#")


def _is_colored(screen: Screen) -> bool:
    return screen.color_system is not None and not screen.no_color


def _targets(task: TrainTaskConfig) -> str:
    """Targets of the task's loss, as `collate_packed` takes them."""
    if isinstance(task, RMConfig):
        return "last" if task.loss_type == "last_token" else "scores"
    return "all" if isinstance(task, SFTConfig) and not task.completion_only_loss else "response"


def _print_head(
    screen: Screen, config: InspectConfig, data: PreparedData, split: str, targets: str, marks: Marks
) -> None:
    """Print a heading: the examples, the trained tokens, and their marks."""
    share = data.report["splits"][split]["eos_share"]
    count = len(data.splits[split])
    _say(screen, f"\n{split} split: {min(config.num_examples, count)} of {count:,} examples")
    looks_at = _COMPARES if targets == "response" and config.task.data_kind == "preference" else _LOOKS_AT[targets]
    ends = (
        "these rows have none: the model writes them"
        if share is None
        else f"{share:.1%} of the responses end in an end token"
    )
    _say(screen, f"the loss {looks_at}; {ends}")
    if not config.num_examples:
        return
    what = "scored" if targets in ("last", "scores") else "trained on"
    legend = Text("+ ")
    if _is_colored(screen):
        for trained, meaning in ((True, what), (False, f"not {what}")):
            for style, word in zip(_STYLES[trained] * 2, meaning.split(), strict=False):
                legend.append(f" {word} ", style)
            legend.append("  ")
    else:
        legend.append(f"{what}   {marks.border} between two tokens   ")
    legend.append(f"{marks.newline} newline   {marks.unfinished} part of the next character")
    screen.print(legend)


def _print_example(screen: Screen, title: str, view: View, marks: Marks) -> None:
    screen.print()
    screen.print(heading(title))
    screen.print(paragraph(", ".join(view.facts), style="faint"))
    for warning in view.warnings:
        screen.print(paragraph(f"WARNING: {warning}", style="bad"))
    width = columns() - len(_GUTTER[True])
    for name, tokens in view.parts.items():
        rank = f" ({view.ranks[name]})" if name in view.ranks else ""
        screen.print(Text(f"{name}{rank}:", "italic"))
        for line in lines(tokens, width):
            screen.print(_line(screen, line, marks))


def _line(screen: Screen, line: list[Piece], marks: Marks) -> Text:
    """Trained tokens stand on green behind a plus sign; without colour a mark stands between two tokens."""
    colored = _is_colored(screen)
    trained = line[0].token.trained
    text = Text(_GUTTER[trained])
    before = None
    for piece in line:
        if not colored and before not in (None, piece.number):
            text.append(marks.border)
        before = piece.number
        shown = marks.newline if piece.text == NEWLINE else piece.text or marks.unfinished
        style = _STYLES[trained][piece.number % 2] if colored else ""
        if colored and piece.token.special:
            style = f"{_SPECIAL_STYLES[trained]} {style.partition(' ')[2]}"
        text.append(shown, style)
    return text


def _next_command(config: InspectConfig, args: ParsedArgs) -> str:
    """Training on the same data: the choices, and the user's own words but those for this command alone."""
    choices = {group: getattr(config, group).config_name for group in ("task", "data", "model")}
    own = {field.name for field in dataclasses.fields(config)} - set(choices)
    given = [word for word in args.overrides if re.split(r"[=@]", word.lstrip("+~"))[0] not in own]
    named = {re.split(r"[=@]", word)[0] for word in given}
    words = [f"{group}={choice}" for group, choice in choices.items() if group not in named]
    return command(["train", *words, *redact_command(given), *args.config_dir()])
