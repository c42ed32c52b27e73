"""Thirty kinds of bad data and nine of bad preferences, in every format that can have them, and the answer to each."""

import gzip
import json
import math
from functools import partial

import pyarrow as pa

from tests.faults.bad_file import (
    GOOD,
    PAIR,
    Bad,
    each,
    jsonl,
    long_line,
    long_quote,
    long_text,
    one,
    parquet,
    parquet_of,
    text_files,
)

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
        one("jsonl", gzip.compress(LINE), "@: the file is compressed; let its name end in .gz", note="gzip"),
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
        one("csv", b"prompt;response\na;b\n", "@ line 1: columns are separated by ';'", note="marks"),
        one("parquet", parquet([GOOD])[:-9], "@: not a readable parquet file"),
    ],
    "duplicate JSON keys": [
        one("jsonl", LINE + b'{"prompt": "a", "prompt": "b"}', "@ line 2: "),
        one("json", b'[{"prompt": "a", "prompt": "b"}]', "@ item 1: "),
        one("csv", b"prompt,prompt\na,b\n", "@ line 1: a column name appears twice: prompt; keep one"),
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
            "row is left of 1: 1 to the test split (lower data.test_split)",
            options={"test_split": 0.9},
            note="away",
        ),
    ],
    "all filtered": each(
        [GOOD, {"prompt": "p", "response": "~"}],
        "no training row is left of 2: 1 empty response (write the responses), 1 too short (lower data.minimum",
        options={"minimum_response_length": 9},
        ignored="~",
    ),
    "val split empty": each([GOOD], "nothing is validated: give more rows, a validation file or", counts={"kept": 1}),
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
        "no training row is left of 2: 2 same responses (give pairs that differ in their first data.max_length=512",
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
