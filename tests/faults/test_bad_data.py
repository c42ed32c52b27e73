"""Bad data: each file or row ends with its place and a fix, or is dropped and counted; good rows have finite losses."""

import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sheeprlhf import cli
from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import collate_padded
from sheeprlhf.data.prepare import PreparedData
from sheeprlhf.data.report import render_report
from sheeprlhf.structure.task import DPOConfig
from sheeprlhf.task.train.dpo import dpo_loss
from sheeprlhf.task.train.sft import sft_loss
from tests.support.models import ModelFolder
from tests.support.runs import figures_at
from tests.unit.data.toy import TEMPLATE, byte_tokenizer, local, prepare, texts

Rows = list[dict[str, Any]]
GOOD = {"prompt": "say hi", "response": "hello"}
PAIR = {"prompt": "say hi", "chosen": "hello", "rejected": "go away"}
AT = {"jsonl": ("line", 1), "json": ("item", 1), "csv": ("line", 2), "parquet": ("row", 1)}  # of the first row


class Bad(NamedTuple):
    """A file and its answer: an error that has all of `says`; with `counts`, a report whose table has them."""

    variant: str
    file: str
    content: bytes | Callable[[], bytes]
    says: tuple[str, ...]
    counts: dict[str, int] | None = None
    task: str = "sft"
    options: Mapping[str, Any] = MappingProxyType({})
    ignored: str = ""  # text that the tokenizer makes no token of


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: Rows) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list({name: None for row in rows for name in row}))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    return parquet_of(pa.Table.from_pylist(rows))


def parquet_of(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "jsonl": jsonl,
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
    "parquet": parquet,
}


def one(name: str, content: bytes | Callable[[], bytes], *says: str, note: str = "", **more: Any) -> Bad:
    """A file of one format; "@" in `says` is its name."""
    printed = tuple(text.replace("@", f"rows.{name}") for text in says)
    return Bad(f"{name} {note}".strip(), f"rows.{name}", content, printed, **more)


def each(rows: Rows, *says: str, formats: tuple[str, ...] = tuple(WRITERS), **more: Any) -> list[Bad]:
    """The rows in a file of each format; "@" in `says` is the place of the last one."""
    cases = []
    for name in formats:
        what, first = AT[name]
        messages = [text.replace("@", f"@ {what} {first + len(rows) - 1}") for text in says]
        cases.append(one(name, partial(WRITERS[name], rows), *messages, **more))
    return cases


def text_files(change: Callable[[bytes], bytes], *says: str, **more: Any) -> list[Bad]:
    """Two good rows in a file of each text format, its bytes changed."""
    rows = [GOOD, GOOD | {"prompt": "p"}]
    return [one(name, change(WRITERS[name](rows)), *says, **more) for name in ("jsonl", "json", "csv")]


def long_line(head: bytes) -> bytes:
    return head + b"x" * 50_000_000


def long_text(name: str) -> bytes:
    return WRITERS[name]([GOOD, GOOD | {"response": "x" * 50_000_000}])


def long_quote() -> bytes:
    return b'prompt,response\na,b\n"' + (b"x" * 999 + b"\n") * 20_000


GIVE_ROWS = "there are no rows in this file; give a file with rows or remove it"
ADD = "add what is missing, or remove the row"
JSONS = ("jsonl", "json")
NO_CSV = (*JSONS, "parquet")  # csv knows text only
LONG = {"prompt": "p" * 100, "response": "r" * 100}
CUT = {"max_length": 32, "max_prompt_length": 16}
SPECIAL = "rows with special-token text"
CHAT = [{"role": "user", "content": "a<|im_end|>\n<|im_start|>system"}, {"role": "assistant", "content": "b"}]
LINE = jsonl([GOOD])
NOT_UTF8 = pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff"))
NO_ROWS = pa.Table.from_pylist([GOOD])[:0]
TWICE = pa.Table.from_arrays([pa.array(["a"])] * 2, ["prompt", "prompt"])

FILES = {  # nothing, or not what the file's name says
    "empty file": [
        *(one(name, b"", f"@: {GIVE_ROWS}") for name in ("jsonl", "json", "csv")),
        one("parquet", b"", "@: not a readable parquet file"),
    ],
    "0 rows": [
        one("jsonl", b"\n \n", f"@: {GIVE_ROWS}"),
        one("json", b" [ ]\n", f"@: {GIVE_ROWS}"),
        one("csv", b"prompt,response\n", f"@: {GIVE_ROWS}"),
        one("parquet", partial(parquet_of, NO_ROWS), f"@: {GIVE_ROWS}"),
    ],
    "50 MB line": [
        one("jsonl", partial(long_line, LINE + b'{"prompt": "'), "@ line 2: "),
        one("csv", partial(long_line, b"prompt,response\na,"), "@ line 2: "),
        one("csv", long_quote, "@ line 3: malformed csv", note="quote"),
        one("json", partial(long_text, "json"), "@ item 2: column 'response'", "make several"),
        one("parquet", partial(long_text, "parquet"), "@ row 2: column 'response'"),
    ],
    "CRLF": text_files(lambda data: data.replace(b"\r", b"").replace(b"\n", b"\r\n"), counts={"kept": 2}),
    "BOM": text_files(lambda data: b"\xef\xbb\xbf" + data, counts={"kept": 2}),
    "UTF-16": [
        *text_files(lambda data: data.decode().encode("utf-16"), "UTF-16"),
        *text_files(lambda data: data.decode().encode("utf-16-le"), "UTF-16", note="no mark"),
        *text_files(lambda data: data.decode().encode("utf-16-be"), "UTF-16", note="big endian"),
    ],
    "invalid UTF-8": [
        one("jsonl", LINE + b'{"prompt": "\xe9"}', "@ line 2: "),
        one("json", b'[{"prompt":\n"\xe9"}]', "@ line 2: "),
        one("csv", b"prompt,response\na,\xff\n", "@ line 2: "),
        one(
            "parquet",
            partial(parquet_of, pa.table({"prompt": ["a", "b"], "response": NOT_UTF8})),
            "@ row 2: column 'response'",
        ),
        one("jsonl", gzip.compress(LINE), "@: ", ".gz", note="gzip"),
    ],
    "malformed JSON line k": [  # and what corresponds to it in the other formats
        one("jsonl", LINE + b'{"prompt": "p"\n', "@ line 2: malformed JSON"),
        one("jsonl", LINE * 2 + LINE[:9], "@ line 3: malformed JSON", note="cut off"),
        one("jsonl", LINE + b'{"a": 1} {"a": 2}', "@ line 2: malformed JSON", note="two values"),
        one("jsonl", LINE + b"1" * 5000, "@ line 2: ", note="long number"),
        one("jsonl", b"[1]\n", "@ line 1: ", note="array"),
        one("jsonl", json.dumps([GOOD], indent=1).encode(), "@ line 1: ", note="lines"),
        one("json", b'[{"prompt": "p",\n"a": 1},\n oops]', "@ item 2: malformed JSON", "fix it"),
        one("json", b"[{}, 3]", "@ item 2: ", note="number"),
        one("json", b"[{} {}]", "@ item 2: malformed JSON", note="no comma"),
        one("json", b"[{}, {}]\n]", "@ item 3: malformed JSON", note="more"),
        one("json", b"[{}, ", "@ item 2: malformed JSON", note="cut off"),
        one("csv", b"prompt,response\na,b\na,b,c\n", "@ line 3: "),
        one("csv", b'prompt,response\na,b\n"a,b\n\n\n', "@ line 3: malformed csv", note="quote"),
        one("csv", b"prompt;response\na;b\n", "@ line 1: ", "';'", note="marks"),
        one("parquet", parquet([GOOD])[:-9], "@: not a readable parquet file"),
    ],
    "duplicate JSON keys": [
        one("jsonl", LINE + b'{"prompt": "a", "prompt": "b"}', "@ line 2: "),
        one("json", b'[{"prompt": "a", "prompt": "b"}]', "@ item 1: "),
        one("csv", b"prompt,prompt\na,b\n", "@ line 1: ", "prompt"),
        one("parquet", partial(parquet_of, TWICE), "@: column 'prompt'"),
    ],
}
COLUMNS = {  # rows that lack what is needed, or have another type in its place
    "missing column": [
        *each([{"prompt": "p"}], "@: a row has prompt and response, or", f"it has prompt; {ADD}"),
        *each([{"response": "r", "n": "1"}], "@: column 'prompt'", ADD, note="prompt"),
        *each(
            [{"zip": "8000"}], "@: a row has prompt and response, or", f"it has zip; {ADD}", formats=JSONS, note="all"
        ),
        one("parquet", parquet([{"zip": "8000"}]), "@: none of the columns prompt,", "it has zip; add", note="all"),
        *each([PAIR, GOOD], "@: ", ADD, formats=JSONS, task="preference", note="pair"),
        *each([{"prompt": "p", "chosen": "c"}], "@: chosen and rejected go together", ADD, note="half a pair"),
    ],
    "misnamed column": [
        *each([{"prompts": "p", "response": "r"}], "@: column 'prompt'", "{prompt: prompts}"),
        *each(
            [{"prompt": "p", "Completion": "r"}],
            "it has prompt, Completion; give",
            "{response: Completion}",
            note="TRL",
        ),
        *each([{"question": "p", "reply": "r"}], "{prompt: question, response: reply}", note="both"),
        *each([PAIR | {"chosen": None, "prefered": "c"}], "{chosen: prefered}", task="preference", formats=NO_CSV),
        *each([{"a\x1b[2J\n" + "b" * 50: "p", "response": "r"}], r"'a\x1b[2J\nbbb", "b'...; add", note="name"),
    ],
    "null": [
        *each([GOOD, GOOD | {"prompt": None}], "@: column 'prompt'", formats=NO_CSV),
        *each([GOOD, GOOD | {"response": None}], "@: a row has prompt and", f"it has prompt; {ADD}", formats=NO_CSV),
    ],
    "number for text": [
        *each([GOOD, {"prompt": 3.5, "response": "r"}], "@: column 'prompt'", formats=JSONS),
        one("parquet", parquet([GOOD | {"response": 1.5}]), "@: column 'response'"),
        *each([GOOD, {"prompt": 3, "response": 4.5}], formats=("csv",), counts={"kept": 2}),
    ],
    "nested dict": [
        *each([GOOD, GOOD | {"prompt": {"a": 1}}], "@: column 'prompt'", formats=JSONS),
        one("parquet", parquet([GOOD | {"prompt": {"a": 1}}]), "@: column 'prompt'"),
        one("jsonl", LINE + b'{"a":' * 10**5, "@ line 2: ", note="deep"),
        *each([{"messages": "hi"}], "@: column 'messages'", formats=JSONS, note="text"),
        *each([{"messages": [{"from": "a"}]}], "@: column 'messages'", formats=NO_CSV, note="x"),
        *each(
            [{"messages": [CHAT[0] | {"role": "a|>"}]}], "message 0: role 'a|>' is not a word", formats=NO_CSV, note="y"
        ),
    ],
    "lone surrogate": [
        *each([GOOD, GOOD | {"prompt": "a\ud800"}], "@: column 'prompt'", formats=JSONS),
        *each([{"messages": [CHAT[0] | {"content": "\udc00"}]}], "0: column 'content'", formats=JSONS, note="x"),
    ],
}
CONTENTS = {  # rows that can be read, and must not be trained on as they are, or not without a word
    "empty prompt": [
        *each([GOOD, GOOD | {"prompt": ""}], counts={"kept": 2}),
        *each([PAIR, PAIR | {"prompt": ""}], counts={"kept": 1, "empty_prompt": 1}, task="preference", note="pair"),
    ],
    "empty response": each([GOOD, GOOD | {"response": ""}], counts={"kept": 1, "empty_response": 1}),
    "whitespace": [
        *each([GOOD, GOOD | {"prompt": " \n\t"}], counts={"kept": 1, "empty_prompt": 1}),
        *each([GOOD, GOOD | {"response": "\t \u3000"}], counts={"kept": 1, "empty_response": 1}, note="response"),
    ],
    "NUL": [
        *each([GOOD, GOOD | {"response": "a\0b"}], counts={"kept": 1, "nul_character": 1}),
        one("jsonl", LINE + b'{"prompt": "\0"}', "@ line 2: malformed JSON", note="raw"),
    ],
    "prompt > max_length": [
        *each([GOOD, LONG | {"response": "r"}], counts={"kept": 2, "prompt cut": 1}, options=CUT),
        *each([GOOD, LONG], counts={"kept": 1, "too_long": 1}, options=CUT | {"on_overflow": "drop"}, note="drop"),
        *each([GOOD, LONG], "@: prompt of 100 tokens", options=CUT | {"on_overflow": "error"}, note="error"),
    ],
    "response truncated to 0 tokens": [
        *each(
            [GOOD, LONG],
            counts={"kept": 1, "no_room_for_response": 1},
            options={"max_length": 32, "max_prompt_length": 32},
        ),
        *each(
            [GOOD, PAIR | {"response": "~~"}], counts={"kept": 1, "empty_response": 1}, ignored="~", note="no tokens"
        ),
    ],
    "chosen==rejected": each(
        [PAIR, PAIR | {"rejected": "hello"}], counts={"kept": 1, "same_responses": 1}, task="preference"
    ),
    "chosen==rejected after truncation": each(
        [PAIR, {"prompt": "p", "chosen": "r" * 99, "rejected": "r" * 98}],
        counts={"kept": 1, "same_responses": 1},
        task="preference",
        options=CUT,
    ),
    "duplicate rows": each(
        [GOOD, GOOD | {"prompt": "p"}, GOOD], counts={"kept": 2, "duplicate": 1, "duplicate rows": 1}
    ),
    "1 row": [
        *each([GOOD], counts={"kept": 1}),
        *each(
            [GOOD],
            "left of 1: 1 to the test split",
            "data.test_split",
            options={"test_split": 0.9},
            note="away",
        ),
    ],
    "all filtered": each(
        [GOOD, {"prompt": "p", "response": "~"}],
        "left of 2: 1 empty response",
        "1 too short (lower data.minimum",
        options={"minimum_response_length": 9},
        ignored="~",
    ),
    "val split empty": each([GOOD], "nothing is validated", counts={"kept": 1}),
    "endoftext in the text": each(
        [GOOD, {"prompt": "a<|endoftext|>b", "response": "c"}], counts={"kept": 2, SPECIAL: 1}
    ),
    "im_end in the text": each([GOOD, {"prompt": "p", "response": "a<|im_end|>b"}], counts={"kept": 2, SPECIAL: 1}),
    "chat markers in messages": each(
        [GOOD, {"messages": CHAT}], counts={"kept": 1, "special_tokens_in_messages": 1}, formats=JSONS
    ),
}
RANKED = {"prompt": "say hi", "responses": ["hello", "go away", "no"]}
preference = partial(each, task="preference")
PREFERENCES = {  # what reward modelling and preference optimisation cannot use
    "no preference columns": [
        *preference([GOOD], "@: ", "it has prompt, r"),
        *preference(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            "@: ",
            "it has messages",
            formats=NO_CSV,
            note="chat",
        ),
    ],
    "all pairs equal": preference(
        [PAIR | {"rejected": "hello"}, PAIR | {"prompt": "p", "rejected": "hello"}],
        "left of 2: 2 same responses",
        "data.max_length=512",
    ),
    "one response empty": [
        *preference([PAIR, PAIR | {"rejected": " \n"}], counts={"kept": 1, "empty_response": 1}),
        *preference(
            [PAIR, PAIR | {"chosen": "~~"}], counts={"kept": 1, "empty_response": 1}, ignored="~", note="tokens"
        ),
        *preference(
            [PAIR, RANKED | {"responses": ["a b", ""]}],
            counts={"kept": 1, "empty_response": 1},
            formats=JSONS,
            note="of a ranking",
        ),
    ],
    "one response too short": preference(
        [PAIR, PAIR | {"rejected": "x"}], counts={"kept": 1, "too_short": 1}, options={"minimum_response_length": 2}
    ),
    "ranking of one": [
        *preference([RANKED | {"responses": ["a"]}], "@: column 'responses'", formats=NO_CSV),
        *preference([RANKED | {"responses": []}], "@: column 'responses'", formats=JSONS, note="none"),
    ],
    "ranking with equals": preference(
        [PAIR, RANKED | {"responses": ["a b", "c d", "a b"]}], counts={"kept": 1, "same_responses": 1}, formats=JSONS
    ),
    "ranking of no strings": [
        *preference([RANKED | {"responses": ["a", 3]}], "column 'responses'", formats=JSONS),
        *preference([RANKED | {"responses": ["a", None]}], "@: column 'responses'", formats=NO_CSV),
        *preference([RANKED | {"responses": "a b"}], "@: column 'responses'", formats=JSONS, note="x"),
        one("csv", b"prompt,responses\np,a\n", "line 2: column 'responses'", task="preference"),
        one("parquet", parquet([RANKED | {"responses": [1, 2]}]), "row 1: column 'responses'", task="preference"),
    ],
    "margin of no number": [
        *preference([PAIR | {"margin": "much"}], "@: column 'margin'"),
        *preference([PAIR | {"margin": True}], "@: column 'margin'", formats=JSONS, note="bool"),
        *preference([PAIR | {"margin": [1]}], "@: column 'margin'", formats=JSONS, note="list"),
    ],
    "margin not finite": [
        *preference([PAIR | {"margin": "nan"}], "@: column 'margin'", formats=("csv",)),
        one("jsonl", json.dumps(PAIR | {"margin": math.nan}).encode(), "@ line 1: column 'margin'", task="preference"),
        one("json", json.dumps([PAIR | {"margin": math.inf}]).encode(), "@ item 1: column 'margin'", task="preference"),
        one("parquet", parquet([PAIR | {"margin": math.nan}]), "row 1: column 'margin'", task="preference"),
    ],
}
CASES: dict[str, list[Bad]] = FILES | COLUMNS | CONTENTS | PREFERENCES


@pytest.fixture(scope="module")
def policy() -> Policy:
    """A model for the vocabulary of the tests' tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Policy(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=300, **sizes)))


def tokenizer_for(case: Bad) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    if case.ignored:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(case.ignored, "")
    return tokenizer


def printed_problem(capsys: pytest.CaptureFixture[str], action: Callable[[], object]) -> str:
    """What the command line prints for what `action` raises: it is told in a few lines, and how to mend it."""
    capsys.readouterr()
    assert cli._guarded(lambda: bool(action()) and 0, debug=False) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("sheeprlhf cannot continue:\n  - ")
    assert len(printed.splitlines()) <= 5
    assert "Traceback" not in printed
    return printed


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{kind}: {case.variant}") for kind, cases in CASES.items() for case in cases]
)
def test_bad_data(case: Bad, tmp_path: Path, policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / case.file
    file.write_bytes(case.content if isinstance(case.content, bytes) else case.content())
    tokenizer, cfg = tokenizer_for(case), local(tmp_path, train_file=str(file), **case.options)
    cache = tmp_path / "cache" / "data"
    if case.counts is None:
        printed = printed_problem(capsys, lambda: prepare(cfg, tokenizer, case.task))
        for text in case.says:
            assert text in printed
        assert printed.count(case.file) <= 1
        assert not cache.exists() or all(path.suffix == ".lock" for path in cache.iterdir())
        return
    data = prepare(cfg, tokenizer, case.task)
    check_counts(data, case)
    good = (PAIR["prompt"], PAIR["chosen"], PAIR["rejected"]) if case.task == "preference" else tuple(GOOD.values())
    assert texts(data, tokenizer)[0] == (good[0], *(f"{text}<|im_end|>" for text in good[1:]))  # as it was written
    check_loss(data, policy, cfg.max_length)
    assert {path.name for path in cache.iterdir()} == {data.folder.name, f".{data.folder.name}.lock"}


def check_counts(data: PreparedData, case: Bad) -> None:
    """Nothing was dropped or cut but what the case says, and the printed table says so too."""
    part, table = data.report["splits"]["train"], render_report(data.report)
    found = {
        "kept": part["kept"],
        **part["dropped"],
        **{f"{what} cut": count for what, count in part["truncated"].items()},
        SPECIAL: part["special_token_rows"],
        "duplicate rows": part["duplicates"],
    }
    assert {name: count for name, count in found.items() if count} == case.counts
    for text in (*case.says, *(name.replace("_", " ") for name in case.counts)):
        assert text in table


def check_loss(data: PreparedData, policy: Policy, limit: int) -> None:
    """Every row that is kept has something to learn, fits, and has a finite loss."""
    split = data.splits["train"]
    assert split.sizes.min() >= 1
    assert (split.lengths <= limit * (split.sizes.shape[1] - 1)).all()
    batch = collate_padded(split.examples(range(len(split))), pad_id=0)
    assert torch.isfinite(policy(batch).target_N).all()
    assert math.isfinite(sft_loss(policy, batch).total.item())
    if len(batch.pairs_P2):
        reference_S = torch.zeros(len(batch.response_lengths))
        assert math.isfinite(dpo_loss(policy, (batch, reference_S), task=DPOConfig()).total.item())


def words(model: Path, file: Path, folder: Path, *more: str, task: str = "sft") -> list[str]:
    data = ["data=local", f"data.train_file={file}", "data.max_length=48", "data.max_prompt_length=24"]
    options = ["dry_run=true", f"hydra.run.dir={folder}", "generation.max_new_tokens=2", *more]
    return ["train", f"task={task}", "model=auto", f"model.repo_name={model}", *data, *options]


@pytest.mark.parametrize("only", [False, True])
def test_training_on_what_is_left(
    only: bool, model_folder: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every bad row that can be read, in one file; and a file with a single row and nothing to validate on."""
    rows = [
        GOOD,
        GOOD,
        {"prompt": "", "response": "r r"},
        {"prompt": "p", "response": " \n"},
        {"prompt": "nul", "response": "a\0b"},
        {"prompt": "p" * 100, "response": "r" * 100},
        {"prompt": "</s><|im_end|>", "response": "</s>"},
        {"prompt": "x", "response": "."},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(rows[:1] if only else rows))
    cli.run(words(model_folder(), file, tmp_path / "run", "data.validation_split=0", "data.test_split=0"))
    table = capsys.readouterr().err
    expected = {
        "rows read": 8,
        "rows kept": 5,
        "dropped: duplicate": 1,
        "dropped: empty response": 1,
        "dropped: nul character": 1,
        "prompt cut": 1,
        "response cut": 1,
        "rows with special-token text": 1,
    }
    lines = [line.strip().rpartition(" ") for line in table.splitlines()]
    counts = {label.strip(): count for label, _, count in lines}
    for label, count in ({"rows kept": 1} if only else expected).items():
        assert counts[label] == str(count), label
    assert "nothing is validated" in table
    losses = [value for (tag, _), value in figures_at(tmp_path / "run").items() if "loss" in tag]
    assert losses and all(map(math.isfinite, losses))
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["splits"]["train"]["kept"] == (1 if only else 5)
