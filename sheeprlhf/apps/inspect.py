"""`inspect`: the data as training will see it. Letters: T positions of a packed row, N targets."""

import dataclasses
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.cells import cell_len
from rich.text import Text
from torch import Tensor

from sheeprlhf.apps.arguments import ParsedArgs
from sheeprlhf.apps.terminal import Screen, columns, heading, paragraph
from sheeprlhf.config.command_words import command
from sheeprlhf.data.example import SCORED, Batch, Example, collate_packed
from sheeprlhf.data.prepare import PreparedData, prepare_data
from sheeprlhf.data.report import render_report
from sheeprlhf.data.rows import STEPS
from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.data.tokenize import encode
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.rollout.episodes import EpisodeSampler
from sheeprlhf.security.redaction import plain_text, redact_command, redact_text, secret_spans
from sheeprlhf.structure.data import DataConfig, KeptColumns
from sheeprlhf.structure.rollout import LocalRolloutConfig
from sheeprlhf.structure.run import InspectConfig
from sheeprlhf.structure.task import RMConfig, SFTConfig, TrainTaskConfig
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import ConfigError, DataError
from sheeprlhf.utils.output import is_own_file, write_file
from sheeprlhf.utils.rendering import render_chat

_UNFINISHED = "\ufffd"  # what decoders write for bytes that are not yet a character


class Token(NamedTuple):
    """A token as it is shown."""

    text: str  # what it adds to the text; empty for one that ends inside a character
    trained: bool  # the loss counts it
    special: bool  # it is a special token, not text that looks like one


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text that each token adds to those before it; of a character of several tokens, the last one adds it."""
    texts: list[str] = []
    context = done = 0  # tokens before `done` are in the texts; those from `context` on are enough to decode the next
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[context:done])
        whole = _decode(tokenizer, ids[context:end])
        if whole.endswith(_UNFINISHED):
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        context, done = done, end
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def without_secrets(texts: Sequence[str]) -> list[str]:
    """The texts of consecutive tokens, those that are part of something like an API key as stars."""
    spans = secret_spans("".join(texts))
    hidden, start = [], 0
    for text in texts:
        end = start + len(text)
        inside = any(start < last and end > first for first, last in spans)
        hidden.append("*" * len(text) if inside else text)
        start = end
    return hidden


def printable(text: str) -> str:
    """The text; characters that a terminal would obey or not show are written as Python escapes them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


_CUT = "cut at data.max_length: no end token"


class View(NamedTuple):
    """An example, ready to print: tokens of each part, ranks of responses, counted facts, and warnings."""

    parts: dict[str, list[Token]]
    ranks: dict[str, str]
    facts: list[str]
    warnings: list[str]


def response_names(count: int) -> dict[str, str]:
    """The names of an example's responses, which come best first, and what each is among them; it may have none."""
    if count == 1:
        return {"response": ""}
    if count == 2:
        return {"chosen": "the better one", "rejected": "the worse one"}
    ends = {1: ", the best", count: ", the worst"}
    letters = {rank: chr(ord("A") + rank - 1) if rank <= 26 else f"no. {rank}" for rank in range(1, count + 1)}
    return {f"response {name}": f"rank {rank} of {count}{ends.get(rank, '')}" for rank, name in letters.items()}


def trained_tokens(batch: Batch, *, scored: bool = False) -> Tensor:
    """(T,) bool: tokens that the loss counts, of one example's batch; `scored` targets are where they are read."""
    assert batch.layout is not None
    [(num_prompt, sizes)] = batch.layout.segments
    response_starts = torch.tensor([*accumulate(sizes[:-1], initial=num_prompt)])
    source_N = batch.head_positions_R[batch.logit_index_N]
    first_N = response_starts[batch.response_index_N]
    place_N = source_N if scored else torch.where(source_N == num_prompt - 1, first_N, source_N + 1)
    ids_T = batch.input_ids_BT[0]
    if not torch.equal(ids_T[place_N], batch.target_ids_N):
        raise AssertionError("a target is not the token at its place: this is a bug")
    trained_T = torch.zeros(len(ids_T), dtype=torch.bool)
    trained_T[place_N] = True
    return trained_T


class Viewer:
    """Makes views of examples; `targets` is what the task trains on, as `collate_packed` takes it."""

    def __init__(self, tokenizer: Any, *, targets: str, template_args: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._targets = tokenizer, targets
        self._scored = targets in SCORED
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._opening = _answer_opening(tokenizer, template_args)

    def view(self, example: Example) -> View:
        """The tokens of an example and the facts about it."""
        trained = [False] * len(example.prompt_ids)
        if example.responses:
            batch = collate_packed([example], targets=self._targets)
            trained = trained_tokens(batch, scored=self._scored).tolist()
        names = response_names(len(example.responses))
        prompt = example.prompt_ids.tolist()
        responses = {name: ids.tolist() for name, ids in zip(names, example.responses, strict=True)}
        parts: dict[str, list[Token]] = {}
        warnings: list[str] = []
        start = 0
        for name, ids in {"prompt": prompt, **responses}.items():
            marks = trained[start : start + len(ids)]
            start += len(ids)
            texts = token_texts(self._tokenizer, ids)
            shown = without_secrets(texts)
            if shown != texts:
                warnings.append(f"stars in the {name} hide what looks like a key or a password; training sees it")
            special = [number in self._special for number in ids]
            parts[name] = [Token(*fields) for fields in zip(shown, marks, special, strict=True)]
        sizes = " + ".join(f"{name} {len(tokens)}" for name, tokens in parts.items())
        facts = [f"{sizes} = {len(trained)} tokens", f"{sum(trained)} {'scored' if self._scored else 'trained on'}"]
        if not responses:
            facts = [f"prompt {len(prompt)} tokens", "no response: the model writes it"]
        self._check_start(prompt, facts, warnings)
        end_ids = end_token_ids(self._tokenizer)
        ended = {name: ids[-1] in end_ids for name, ids in responses.items()}
        if len(ended) > 2 and all(ended.values()):
            facts.append("all responses end in an end token")
        else:
            facts += [
                f"{name} {f'ends in {self._end_name(responses[name][-1])}' if end else _CUT}"
                for name, end in ended.items()
            ]
        self._check_template(prompt, facts, warnings)
        ranks = {name: rank for name, rank in names.items() if rank}
        if ranks and example.margin:
            facts.append(f"margin {example.margin:g}")
        if self._targets == "steps" and example.columns:
            facts.append(f"steps: {', '.join('right' if good else 'wrong' for good in example.columns[STEPS[1]])}")
        return View(parts, ranks, facts, warnings)

    def _end_name(self, number: int) -> str:
        return "EOS" if number == self._tokenizer.eos_token_id else str(self._tokenizer.convert_ids_to_tokens(number))

    def _check_start(self, prompt: Sequence[int], facts: list[str], warnings: list[str]) -> None:
        bos = self._tokenizer.bos_token_id
        number = next((place for place, token in enumerate(prompt) if token != bos), len(prompt))
        facts.append(f"BOS: {number}" + ("" if number else " (neither the tokenizer nor the chat template adds one)"))
        if number > 1:
            advice = "take it out of the chat template, or out of the tokenizer's post-processor"
            warnings.append(f"the prompt begins with {number} BOS tokens, and models know one: {advice}")
        if number == len(prompt) or list(prompt) == [self._tokenizer.eos_token_id]:
            facts.append("no prompt: it is a text of which all tokens are learned, or data.max_prompt_length cut it")

    def _check_template(self, prompt: Sequence[int], facts: list[str], warnings: list[str]) -> None:
        """A template that is applied to its own output opens an answer and leaves it empty."""
        size = len(self._opening)
        if not size or list(prompt[-size:]) != self._opening:
            return
        ends = [end for end in range(size, len(prompt) + 1) if list(prompt[end - size : end]) == self._opening]
        empty = sum(1 for end in ends if end < len(prompt) and prompt[end] in self._special)
        if not empty:
            facts.append("chat template applied once")
            return
        advice = "the chat template was applied to its own output, or an assistant's message is empty"
        warnings.append(f"the prompt opens {empty + 1} answers and leaves {empty} without text: {advice}")


def _answer_opening(tokenizer: Any, template_args: Mapping[str, Any] | None) -> list[int]:
    """The ids with which the chat template asks for an answer; empty if it has no such thing."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [{"role": "user", "content": "a"}]
    try:
        asked, bare = (render_chat(tokenizer, turns, template_args, ask=ask) for ask in (True, False))
    except DataError:
        return []  # one that refuses this conversation
    return encode(tokenizer, [asked.removeprefix(bare)], control_tokens=True)[0] if asked.startswith(bare) else []


Lengths = dict[str, np.ndarray]

_COLORS = {"prompt": "#8a8f98", "response": "#3f9c54", "better": "#3f9c54", "worse": "#b8862d", "total": "#3a6ea5"}
_LIMIT_COLOR = "#c8412b"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
_MAX_BARS = 40
_MAX_LINES = 10
_FAR_LIMIT = 2.5  # a limit this many times as long as the longest row would leave no room for the bars


def lengths_of(split: TokenizedSplit) -> Lengths:
    """Tokens of every prompt, response (of ranked ones, the best and the rest) and row of a split."""
    best, worse = split.sizes[:, 1:2], split.sizes[:, 2:]
    parts = {"better": best, "worse": worse} if worse.size else {"response": best}
    of_responses = {kind: sizes[sizes >= 0] for kind, sizes in parts.items() if (sizes >= 0).any()}
    return {"prompt": split.sizes[:, 0], **of_responses, "total": split.lengths}


def text_histogram(lengths: Lengths, *, bar: str, longest_bar: int) -> list[str]:
    """A head and at most ten lines: a range of lengths, and for each kind of length a bar and its count."""
    longest = int(max(values.max() for values in lengths.values()))
    step = _step(longest)
    shortest = int(min(values.min() for values in lengths.values()))
    edges = np.arange(1 + (shortest - 1) // step * step, longest + step + 1, step)
    counts = {kind: np.histogram(values, bins=edges)[0] for kind, values in lengths.items()}
    labels = [f"{low}-{low + step - 1}" if step > 1 else f"{low}" for low in edges[:-1].tolist()]
    first = max(map(len, [*labels, "tokens"]))
    digits = {kind: len(f"{count.max():,}") for kind, count in counts.items()}
    head = "  ".join(f"{kind:<{longest_bar + digits[kind] + 1}}" for kind in counts)
    lines = [f"{'tokens':>{first}}  {head}".rstrip()]
    for number, label in enumerate(labels):
        cells = []
        for kind, count in counts.items():
            size = math.ceil(longest_bar * count[number] / count.max())  # one row in a thousand still shows
            count_text = f"{count[number]:,}" if count[number] else ""
            cells.append(f"{bar * size:<{longest_bar}} {count_text:>{digits[kind]}}")
        lines.append(f"{label:>{first}}  {'  '.join(cells)}".rstrip())
    return lines


def _step(longest: int) -> int:
    """The width of a bar, so that ten at most reach to the longest: a round number if it is more than a few."""
    step = math.ceil(longest / _MAX_LINES)
    unit = 1 if step <= 5 else 5 if step <= 50 else 50
    return math.ceil(step / unit) * unit


def draw_histograms(splits: Mapping[str, TokenizedSplit], cfg: DataConfig, title: str, software: str) -> bytes:
    """A PNG: a row for each split, a column for each kind of length, the limits of the configuration as lines."""
    from matplotlib import style
    from matplotlib.figure import Figure  # without pyplot: no window, and no figures that others share

    lengths = {name: lengths_of(split) for name, split in splits.items()}
    kinds = [kind for kind in _COLORS if any(kind in of_split for of_split in lengths.values())]
    limits = {"prompt": ("data.max_prompt_length", cfg.max_prompt_length)}
    if "better" not in kinds:  # else the limit is that of the prompt with its longest response
        limits["total"] = ("data.max_length", cfg.max_length)
    with style.context(["default", _STYLE]):  # the user's own settings may not fit
        figure = Figure(figsize=(11, 1.3 + 1.75 * len(splits)), layout="constrained")
        figure.suptitle(title, fontsize=11)
        grid = figure.subplots(len(splits), len(kinds), sharex="col", squeeze=False)
        for column, kind in enumerate(kinds):
            longest = int(max(of_split[kind].max() for of_split in lengths.values() if kind in of_split))
            step = math.ceil(longest / _MAX_BARS)
            edges = np.arange(1, longest + step + 1, step) - 0.5
            for axes, (name, values) in zip(grid[:, column], lengths.items(), strict=True):
                if kind in values:
                    _draw_one(axes, values[kind], edges, _COLORS[kind])
                else:
                    axes.set_title("none", fontsize=8)
                    axes.set_yticks([])
                if column == 0:
                    axes.set_ylabel(f"{name}: {len(splits[name]):,} rows")
            grid[-1, column].set_xlabel("tokens")
            key, limit = limits.get(kind, ("", 0))
            far = limit > _FAR_LIMIT * longest
            grid[0, column].set_xlim(0, 1.04 * max(edges[-1], 0 if far else limit))
            _add_title(grid[0, column], 1.36, f"{kind} length", fontsize=11)
            if key:
                _draw_limit(list(grid[:, column]), key, limit, far=far)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130, metadata={"Software": software})
    return image.getvalue()


def _draw_one(axes: Any, values: np.ndarray, edges: np.ndarray, color: str) -> None:
    """One histogram, its figures above it."""
    axes.hist(values, bins=edges, color=color)
    axes.yaxis.get_major_locator().set_params(integer=True)
    median, most = (int(np.percentile(values, p, method="inverted_cdf")) for p in (50, 95))
    axes.set_title(f"median {median},  95 % up to {most},  longest {values.max()}", fontsize=8)


def _draw_limit(column: Sequence[Any], key: str, limit: int, *, far: bool) -> None:
    """A limit of the configuration: a line in each histogram of a column, or a note that it is beyond all of them."""
    text = f"{key} = {limit}" + (", far to the right" if far else "")
    _add_title(column[0], 1.2, text, fontsize=8, color=_LIMIT_COLOR)
    if not far:
        for axes in column:
            axes.axvline(limit + 0.5, color=_LIMIT_COLOR, linestyle="--", linewidth=1.2)


def _add_title(axes: Any, height: float, text: str, **style: Any) -> None:
    """A line above a column."""
    axes.text(0.5, height, text, transform=axes.transAxes, ha="center", **style)


SIGNATURE = "sheeprlhf inspect"  # in both files: they may be replaced
_GUTTER = {True: "+ ", False: "  "}
_STYLES = {  # two shades of each, taken in turn, show where a token ends
    True: ("black on #a6e3a1", "black on #7cc97a"),
    False: ("#d0d3d9 on #3b3f46", "#d0d3d9 on #50555e"),
}
_LOSS_MEANINGS = {  # by targets
    "response": "counts responses only",
    "all": "counts prompts and responses (task.completion_only_loss=false)",
    "last": "compares the scores after the last token of each response",
    "steps": "compares the scores after the last token of each step with its label",
    "scores": "compares the scores after the tokens of the responses, from the first that differs on",
    "pairs": "compares the log-probabilities of whole responses",
}
_SPECIAL_STYLES = {True: "bold #7a0073", False: "bold #ff9df5"}


class Marks(NamedTuple):
    """Marks for characters that have no visible form."""

    newline: str
    border: str
    unfinished: str
    bar: str


_MARKS, _ASCII_MARKS = Marks("\u21b5", "\u00a6", "\u2026", "\u2588"), Marks("\\n", "|", "~", "#")


def run(config: InspectConfig, args: ParsedArgs) -> int:
    """Print report, examples and lengths; write histograms and report into `output_dir`. Raises SheepError."""
    screen = Screen()
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{config.data.config_name}-{config.model.config_name}")
    files = {kind: Path(config.output_dir, f"{name}-{kind}") for kind in ("lengths.png", "data_report.json")}
    replaced = _check_files(list(files.values()))
    tokenizer = load_tokenizer(config.model)
    say, sampler = partial(_print, screen), None
    if isinstance(config.rollout, LocalRolloutConfig) and config.rollout.environment is not None:
        sampler = EpisodeSampler(tokenizer, config.rollout, say)
    kept, kind = KeptColumns(every=sampler is not None), config.task.data_kind
    data = prepare_data(config.data, tokenizer, kind=kind, say=print, progress=sys.stderr.isatty(), kept=kept)
    _print(screen, render_report(data.report))
    first, *_ = [name for name in config.task.train_splits if name in data.splits] or config.task.train_splits
    split = config.split or first
    if split not in data.splits:
        full = ", ".join(f"{name} ({len(rows):,})" for name, rows in data.splits.items())
        raise DataError(f"split={split} has no rows; those with rows are {full}: give split={next(iter(data.splits))}")

    targets = _targets(config.task)
    viewer = Viewer(tokenizer, targets=targets, template_args=config.data.template_args)
    marks = _MARKS if screen.encoding.startswith("utf") else _ASCII_MARKS
    _print_head(screen, config, data, split, targets, marks)
    rows = data.splits[split]
    for number in range(min(config.num_examples, len(rows))):
        example = rows.example(number)
        _print_example(screen, f"example {number + 1}: row {example.row_id}", viewer.view(example), marks)
    if sampler is not None:
        _print_episode(screen, sampler, rows.example(0), viewer, marks)

    lengths = lengths_of(rows)
    _print(screen, f"\nlengths of the {split} split, {'responses' if 'better' in lengths else 'rows'} of each:")
    longest_bar = min((columns() - 12 * len(lengths)) // len(lengths), 20)
    _print(screen, "\n".join(text_histogram(lengths, bar=marks.bar, longest_bar=longest_bar)))
    title = f"Token lengths of data={config.data.config_name} with the tokenizer of model={config.model.config_name}"
    report = {"made_by": SIGNATURE, **data.report}
    _write(files["lengths.png"], draw_histograms(data.splits, config.data, title, SIGNATURE))
    _write(files["data_report.json"], json.dumps(report, indent=1).encode())
    _print(screen, "")
    for path in files.values():
        _print(screen, f"wrote {path}" + (" (in place of an earlier one)" if path in replaced else ""))
    _print(screen, f"next: {_next_command(config, args)}")
    return 0


def _check_files(paths: list[Path]) -> set[Path]:
    """The files that are there already, all ours. Raises ConfigError if one is not."""
    there = {path for path in paths if os.path.lexists(path)}
    foreign = [path for path in sorted(there) if not is_own_file(path, SIGNATURE.encode())]
    if foreign:
        names = " and ".join(str(path) for path in foreign)
        raise ConfigError(f"output_dir: {names} is not of an earlier inspect and stays; give another output_dir")
    return there


def _write(path: Path, content: bytes) -> None:
    try:
        write_file(path.parent, path.name, content)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"output_dir: {path} cannot be written ({why}); give another output_dir") from error


def _print(screen: Screen, text: str) -> None:
    screen.print(plain_text(redact_text(text)))


def _is_colored(screen: Screen) -> bool:
    return screen.color_system is not None and not screen.no_color


def _targets(task: TrainTaskConfig) -> str:
    """Targets of the task's loss, as `collate_packed` takes them."""
    if isinstance(task, RMConfig):
        return "last" if task.loss_type in RMConfig.of_last_tokens else "scores"
    if task.data_kind == "stepwise":
        return "steps"
    return "all" if isinstance(task, SFTConfig) and not task.completion_only_loss else "response"


def _print_head(
    screen: Screen, config: InspectConfig, data: PreparedData, split: str, targets: str, marks: Marks
) -> None:
    """Print a heading: the examples, the trained tokens, and their marks."""
    share = data.report["splits"][split]["eos_share"]
    count = len(data.splits[split])
    _print(screen, f"\n{split} split: {min(config.num_examples, count)} of {count:,} examples")
    of_pairs = targets == "response" and config.task.data_kind == "preference"
    none = "these rows have none: the model writes them"
    ends = none if share is None else f"{share:.1%} of the responses end in an end token"
    _print(screen, f"the loss {_LOSS_MEANINGS['pairs' if of_pairs else targets]}; {ends}")
    if not config.num_examples:
        return
    what = "scored" if targets in SCORED else "trained on"
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
    for name, tokens in view.parts.items():
        rank = f" ({view.ranks[name]})" if name in view.ranks else ""
        screen.print(Text(f"{name}{rank}:", "italic"))
        for line in _lines(screen, tokens, marks):
            screen.print(line)


def _print_episode(screen: Screen, sampler: EpisodeSampler, row: Example, viewer: Viewer, marks: Marks) -> None:
    """Print the tools of an environment, and an episode in which made-up messages take the place of the model's."""
    _print(screen, f"\n{sampler.describe()}")
    for tool in sampler.tools:
        _print(screen, json.dumps(tool))
    episode = sampler.example(row)
    view = viewer.view(row._replace(responses=(np.array(episode.ids, np.int32),), trained=np.array(episode.trained)))
    failed = [f"it failed: {episode.error}"] if episode.error is not None else []
    view.facts.append(f"reward {episode.reward:g}")
    title = f"episode of row {row.row_id}: a made-up call and answer in place of the model's"
    _print_example(screen, title, view._replace(warnings=[*view.warnings, *failed]), marks)


def _lines(screen: Screen, tokens: Sequence[Token], marks: Marks) -> Iterator[Text]:
    """Lines of whole tokens, each all trained on, which is on green after a plus sign, or all not, cut at newlines.

    Without colour, a mark separates two tokens.
    """
    colored, line, of_trained, last = _is_colored(screen), Text(), False, -1
    for number, token in enumerate(tokens):
        style = _STYLES[token.trained][number % 2] if colored else ""
        if colored and token.special:
            style = f"{_SPECIAL_STYLES[token.trained]} {style.partition(' ')[2]}"
        for part in re.findall(r"\n|[^\n]+", token.text) or [""]:
            shown = marks.newline if part == "\n" else printable(part) or marks.unfinished
            is_full = line.cell_len + cell_len(shown) >= columns()
            if line and (token.trained != of_trained or (is_full and part != "\n")):
                yield line
                line = Text()
            if not line:
                line, of_trained = Text(_GUTTER[token.trained]), token.trained
            elif not colored and last != number:
                line.append(marks.border)
            line.append(shown, style)
            last = number
            if part == "\n":
                yield line
                line = Text()
    if line:
        yield line


def _next_command(config: InspectConfig, args: ParsedArgs) -> str:
    """Training on the same data: the choices, and the user's own words except those for this command."""
    choices = {group: getattr(config, group).config_name for group in ("task", "data", "model")}
    own = {field.name for field in dataclasses.fields(config)} - set(choices)
    given = [word for word in args.words if re.split(r"[=@]", word.lstrip("+~"))[0] not in own]
    named = {re.split(r"[=@]", word)[0] for word in given}
    words = [f"{group}={choice}" for group, choice in choices.items() if group not in named]
    return command(["train", *words, *redact_command(given), *args.config_dir()])
