"""`report` shows what the files of runs say, nothing of which a browser obeys, and overwrites nothing of others."""

import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sheeprlhf.apps import runs as run_files
from sheeprlhf.apps.report import write_report
from sheeprlhf.apps.report_page import (
    MAX_RUNS,
    charts_of,
    downsample,
    draw_curves,
    duration_text,
    figure_text,
    group_tags,
    point_table,
    wilson,
)
from sheeprlhf.apps.runs import Answer, Curve, parse_evaluation
from sheeprlhf.cli import run
from sheeprlhf.engine.rundir import RunLock
from tests.support.devtools import dump_dom, find_chromium
from tests.support.past_runs import make_past_run, write_evaluation
from tests.support.runs import exit_code

SECTIONS = ["runs", "results", "curves", "samples", "configuration", "data", "speed"]
ELEMENTS = set(
    "html head meta title style body header main section nav a h1 h2 h3 h4 h5 p small b span ul li div table thead "
    "tbody tr th td details summary code pre article figure figcaption img "
    "svg g path text defs clippath rect use".split()
)
EVIL = "<script>document.title='ran'</script><img src=x onerror=alert(1)>[x](javascript:alert(1))\"' onload=y <b>"
SECRET = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"
BROWSER = find_chromium()


class Page(HTMLParser):
    """A page taken apart by Python's own parser: elements, tables by the heading above them, texts of <pre>."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.pres: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._heading = self._section = ""
        self._rows: list[list[str]] = []
        self.feed(path.read_text())
        assert self._open == []  # every element ends, in order

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("meta", "img", "path", "use", "rect"):
            return
        self._open.append(tag)
        if tag in ("h2", "h3", "summary") and "table" not in self._open:
            self._heading = ""
        if tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "pre":
            self.pres.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._heading] = self._rows
            self._rows = []

    def handle_data(self, data):
        self.text += data
        if {"h2", "h3", "summary"} & set(self._open) and "table" not in self._open and "small" not in self._open:
            self._heading += data
        if "pre" in self._open:
            self.pres[-1] += data
        elif self._rows and self._rows[-1] and {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data

    def row(self, table: str, name: str) -> list[str]:
        """The cells behind a row's name."""
        (found,) = [cells for first, *cells in self.tables[table] if first == name]
        return found


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[..., Page]:
    """A function (folders) -> the page of these runs."""

    def make(*folders: Path, **options: object) -> Page:
        return Page(write_report(list(map(str, folders)), to=str(tmp_path / "page.html"), **options).files[0])

    return make


def test_a_page_tells_what_the_files_say(tmp_path, page_of):
    runs = tmp_path / "runs"
    early = {"best_metric": 0.25, "stopped_early": True}
    dpo = make_past_run(runs / "b", 1, task="dpo", peak_memory=1_500_000_000, **early)
    sft = make_past_run(runs / "a", 0)
    (dpo / "config.yaml").write_text(f"{(dpo / 'config.yaml').read_text()}extra: 1\n".replace("epochs: 2", "epochs: 5"))
    write_evaluation(sft, "perplexity-test-final", task="perplexity", perplexity=12.5, tokens=12345)
    write_evaluation(dpo, "perplexity-test-final", task="perplexity", perplexity=11.25, tokens=12345)
    write_evaluation(sft, "perplexity-test-best", task="perplexity", perplexity=12.25, weights="best")
    interval = {"model": {"rougeL": [20.5, 18.25, 22.5]}, "lead": {"rougeL": [10.5, 9.25, 12.5]}}
    rows = [{"prompt": "Q?", "response": "An answer.", "reference": "The answer.", "rougeL": 50.0}]
    write_evaluation(dpo, "rouge-test-final", rows, task="rouge", rougeL=20.5, mean_low_high=interval)
    page = page_of(runs)

    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == SECTIONS
    assert page.tables["Runs"][0] == ["", "sft", "dpo"]  # in the order of their start
    assert page.row("Runs", "state") == ["finished", "stopped early"]
    assert page.row("Runs", "best validation") == ["-", "0.2500"]
    assert page.row("Runs", "took") == ["1 min 05 s", "1 min 05 s"]
    assert page.row("Runs", "perplexity on docstrings/test") == ["perplexity 12.50", "perplexity 11.25"]
    assert page.tables["perplexity on docstrings/test"][0] == ["", "sft", "sft best", "dpo"]
    assert page.row("perplexity on docstrings/test", "perplexity") == ["12.50", "12.25", "11.25"]
    assert page.row("perplexity on docstrings/test", "tokens") == ["12,345", "-", "12,345"]
    assert page.row("rouge on docstrings/test", "rougeL") == ["20.50 18.25 to 22.50"]  # the interval is a line below
    assert page.row("rouge on docstrings/test", "lead rougeL") == ["10.50 9.250 to 12.50"]
    assert page.tables["Configuration"] == [["", "sft", "dpo"], ["task", "sft", "dpo"], ["task.epochs", "1", "5"]]
    assert page.tables["1 option that only some of the runs have"][1:] == [["extra", "-", "1"]]
    assert page.row("docstrings, as sft rows", "dropped: too long") == ["2"]
    assert page.row("Speed and memory", "one step") == ["2.0 s", "2.0 s"]
    assert page.row("Speed and memory", "items a second") == ["25", "25"]
    assert page.row("Speed and memory", "peak memory") == ["-", "1.5 GB"]
    said = ["sft says 4<|eos|>", "sft says 2<|eos|>", "dpo says 4<|eos|>", "dpo says 2<|eos|>"]
    assert page.pres[:6] == ["Say hello.", "Hello!<|eos|>", *said]
    assert page.pres[6:] == ["Q?", "The answer.", "An answer."]
    titles = [attributes["aria-label"] for tag, attributes in page.elements if attributes.get("class") == "chart"]
    assert "train/loss of sft: sft 4 at step 1, 1 at step 4; from 1 to 4" in titles  # dpo's loss is another thing


def test_every_kind_of_result_is_read():
    points = [{"what": "best of 1", "n": 1, "score": 0.25, "kl": None}, {"what": "final", "n": None, "score": 0.5}]
    record = {"score": 0.5, "score_interval": [0.25, 0.75], "win_rate": 0.625, "of": "references", "kl": None}
    record |= {"by_length": {"longer": {"pairs": 3}}, "range": [1, 2], "finished": True, "points": points, "seed": 42}
    record |= {"task": "reward", "split": "test", "data": "d", "weights": "step-4", "rm_accuracy": 0.875}
    found = parse_evaluation("reward-rm-test-step-4", record)
    assert (found.title, found.weights) == ("reward by rm on d/test", "step-4")
    assert found.numbers == {
        "score": (0.5, 0.25, 0.75),
        "win rate": (0.625,),
        "by length longer pairs": (3,),
        "range": (1, 2),
        "rm accuracy": (0.875,),
    }
    table = point_table(found.lists["points"])
    assert table.head == ["what", "n", "score"]  # kl has no value
    assert table.rows == [["best of 1", "1", "0.2500"], ["final", "-", "0.5000"]]
    assert (
        parse_evaluation("rouge-test-final", {"task": "rouge", "split": "test", "weights": "final"}).title
        == "rouge on ?/test"
    )


def _fill_with(folder: Path, evil: str) -> Path:
    """A run of whose texts each is `evil`, names and keys included."""
    make_past_run(folder, task=evil, run_name=evil, data=evil, model=evil, command=["train", evil])
    tree = {"task": {"config_name": evil, evil: evil}, "seed": evil, evil: [evil]}
    (folder / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    with (folder / "metrics.csv").open("a") as file:
        file.write(f"1,{evil.replace(chr(10), '')}/loss,1.0,5\r\n")
    (folder / "samples" / "step-4.txt").write_text(f"[prompt]\n{evil}\n[model]{evil}\n{evil}\n[reference]\n{evil}\n")
    rows = [{"prompt": evil, "response": evil, "reference": evil, evil: 0.5}]
    odd = {evil: 1.5, f"{evil}s": [{evil: evil}]}
    write_evaluation(folder, evil.replace("/", ""), rows, task=evil, split=evil, weights=evil, **odd)
    (folder / "eval" / f"{evil.replace('/', '')}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + evil.encode())
    report = {"name": evil, "kind": evil, "splits": {evil: {"read": 1, "dropped": {evil: 1}}}, "notes": [evil]}
    (folder / "data_report.json").write_text(json.dumps(report))
    return folder


def test_nothing_that_a_file_says_is_obeyed(tmp_path, page_of):
    page = page_of(_fill_with(tmp_path / "run", EVIL), make_past_run(tmp_path / "other"))
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("xlink:href") or "#").startswith("#")
        assert (attributes.get("src") or "data:image/png;").startswith("data:image/png;")
    assert page.pres.count(EVIL) == 6  # shown as it is: prompt, reference and answer, of a sample and of an evaluation
    policy = [attributes for tag, attributes in page.elements if "http-equiv" in attributes]
    assert policy[0]["content"].startswith("default-src 'none';")
    assert "url(" not in page.text and "@import" not in page.text


def test_secrets_and_control_characters_are_not_shown(tmp_path, page_of):
    bidi = "\u202e"
    page = page_of(_fill_with(tmp_path / "run", f"a \x1b[31m{SECRET}\x07{bidi} z"), make_past_run(tmp_path / "other"))
    assert SECRET not in page.text and "a <redacted> z" in page.text
    assert not {"\x1b", "\x07", bidi} & set(page.text)


@pytest.mark.parametrize(
    "inside", ["config.yaml", "metrics.csv", "samples", "samples/step-4.txt", "eval", "data_report.json", "run.json"]
)
def test_no_link_of_a_strangers_run_is_followed(inside, tmp_path, page_of):
    folder, away = make_past_run(tmp_path / "run"), tmp_path / "away"
    write_evaluation(folder, "x-test-final", [{"prompt": "p", "response": "r"}], task="x", number=1.0)
    (folder / inside).rename(away)
    files = [away] if away.is_file() else list(away.iterdir())
    for path in files:
        marks = dict.fromkeys(("tiny", "says", "train/loss", "docstrings", "sft"), "LEAKED")
        content = path.read_text()
        for old, new in marks.items():
            content = content.replace(old, new)
        path.write_text(content.replace('"p"', '"LEAKED"'))
    assert any("LEAKED" in path.read_text() for path in files)
    (folder / inside).symlink_to(away)
    page = page_of(folder)
    assert "LEAKED" not in page.text


DAMAGED = {  # file: contents of it, and what is said
    "config.yaml": (["model: [", "- 1\n", None], "its configuration cannot be read"),
    "metrics.csv": (["", "step,tag,value,wall_time\r\n1,train/loss,nan,1\r\n", "\x00\xff" * 500, None], "metrics.csv"),
    "run.json": (["{", "[]", "[" * 100_000, None], "its state is un"),
    "data_report.json": (["{", "[1]", '{"splits": [1]}', '{"splits": {"train": 1}}'], "data_report.json is damaged"),
    "eval/x.json": (["{", '"text"', '{"task": [1]}', '{"big": 1' + "0" * 400 + "}"], "eval/x.json is damaged"),
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in DAMAGED for content in DAMAGED[name][0]])
def test_what_is_damaged_or_missing_is_reported_and_the_rest_shown(name, content, tmp_path, page_of):
    folder = make_past_run(tmp_path / "run")
    (folder / "eval").mkdir()
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    page = page_of(folder)
    assert DAMAGED[name][1] in page.text
    assert name.endswith("json") <= (content is None or page.text.count(f"{name} is damaged") == 1)
    assert "sft says 4<|eos|>" in page.pres
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == SECTIONS


def test_saved_rollouts_are_shown_with_their_scores(tmp_path, page_of):
    """Of three files one is damaged, and one is the table of another program."""
    folder = make_past_run(tmp_path / "run", task="grpo")
    (folder / "rollouts").mkdir()
    rows = {"prompt": [EVIL, "Q?"], "response": ["One", f"{SECRET}"], "step": [3, 3], "finished": [True, False]}
    table = pa.table(rows | {"score": [0.25, 1.0], "reward/length": [0.5, 2.0], "ids": [[1], [2]]})
    for number, content in enumerate((table, table.drop_columns("step"))):
        pq.write_table(content, folder / "rollouts" / f"rollout-{number:06d}.parquet")
    (folder / "rollouts" / "rollout-000002.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    page = page_of(folder)
    assert "step 3, score 0.25, length 0.5" in page.text and "step 3, score 1, length 2, cut" in page.text
    assert EVIL in page.pres and SECRET not in page.text
    assert "rollout-000001.parquet" in page.text and "rollout-000002.parquet" in page.text
    assert {tag for tag, _ in page.elements} <= ELEMENTS


def test_texts_without_control_tokens_end_as_the_notes_of_the_samples_say():
    asked = "[prompt]\nQ?\n[model] score 1.000, KL 0.10\nYes.\n[reference]\nNo.\n\n[prompt]\nR?\n"
    exchanges = run_files.parse_samples([(3, f"--- samples\n{asked}[model] score 0.000, KL 0.20, cut\nYe\n")])
    assert exchanges["Q?"].answers == [Answer(3, "score 1.000, KL 0.10", "Yes.", "<end>")]
    assert exchanges["Q?"].references == [Answer(None, "", "No.", "<end>")]
    assert exchanges["R?"].answers == [Answer(3, "score 0.000, KL 0.20, cut", "Ye", "")]


def test_a_run_in_progress_is_shown_and_reported(tmp_path, page_of, capsys):
    folder = make_past_run(tmp_path / "run", status="running", finished=None)
    with RunLock(folder):
        run(["report", str(folder), "--to", str(tmp_path / "page.html")])
        page = Page(tmp_path / "page.html")
    assert page.row("Runs", "state") == ["running"]
    assert page.row("Runs", "took") == ["8.0 s"]  # until its last row
    assert "sft is running" in page.text
    assert capsys.readouterr().out.splitlines()[0].startswith("note: sft is running")


def test_of_large_records_the_newest_part_is_shown(tmp_path, page_of, monkeypatch):
    folder = make_past_run(tmp_path / "run")
    rows = "".join(f"{step},train/loss,{step}.5,1.0\r\n" for step in range(1, 1001))
    (folder / "metrics.csv").write_text(rows)
    shown = "998,train/loss,998.5,1.0\r\n999,train/loss,999.5,1.0\r\n1000,train/loss,1000.5,1.0\r\n"
    monkeypatch.setattr(run_files, "_METRICS_BYTES", len(f"97,train/loss,997.5,1.0\r\n{shown}"))  # not step 97
    for step in range(5, 120):
        (folder / "samples" / f"step-{step}.txt").write_text(f"[prompt]\nSay hello.\n[model]\nanswer {step}\n")
    page = page_of(folder)
    labels = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("class") == "chart"]
    assert labels == ["train/loss: sft 998.5 at step 998, 1,000.5 at step 1,000; from 998.5 to 1,000.5"]
    assert "metrics.csv is large" in page.text
    assert page.pres[1] == "answer 119" and "sft says 4<|eos|>" not in page.pres


def test_runs_with_one_task_get_names_of_their_own(tmp_path, page_of):
    made = [make_past_run(tmp_path / "runs" / str(n), n, run_name=name) for n, name in enumerate("abb")]
    assert page_of(tmp_path / "runs").tables["Runs"][0] == ["", "sft a", "sft 2", "sft 3"]
    assert page_of(made[2], made[0], made[2]).tables["Runs"][0] == ["", "sft b", "sft a"]  # as given, each once
    assert page_of(made[1]).tables["Runs"][0] == ["", "sft"]


def test_no_more_runs_than_can_be_distinguished(tmp_path, page_of):
    for number in range(MAX_RUNS + 2):
        make_past_run(tmp_path / "runs" / f"{number:02}", number)
    page = page_of(tmp_path / "runs")
    assert len(page.tables["Runs"][0]) == 1 + MAX_RUNS
    assert page.row("Configuration", "task.epochs") == [str(number + 1) for number in range(2, MAX_RUNS + 2)]
    assert f"these are the newest {MAX_RUNS}" in page.text


def test_without_words_the_newest_run_goes_into_a_new_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        make_past_run(Path("logs/runs/d/m/sft") / f"time-{number}" / "default", number)
    for _ in range(2):  # within one second
        run(["report"])
    printed = capsys.readouterr().out
    assert printed.count("this is the newest, logs/runs/d/m/sft/time-1/default") == 2
    pages = sorted(Path("logs/report").iterdir())
    assert len(pages) == 2 and all(f"saved: {page}" in printed for page in pages)
    assert all(page.suffix == ".html" for page in pages)


def test_images_are_written_beside_the_page_for_each_group(tmp_path, capsys):
    folder = make_past_run(tmp_path / "run")
    run(["report", str(folder), f"--to={tmp_path / 'out'}", "--png"])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["report-loss.png", "report-training.png", "report.html"]
    assert capsys.readouterr().out.count("saved: ") == 3
    assert (tmp_path / "out" / "report-loss.png").read_bytes()[:4] == b"\x89PNG"
    run(["report", str(folder), f"--to={tmp_path / 'out'}", "--png"])  # our own files may be replaced


@pytest.mark.parametrize("name", ["report.html", "report-loss.png"])
def test_only_reports_are_replaced(name, tmp_path, capsys):
    folder, out = make_past_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("my own sheeprlhf report")
    assert exit_code(["report", str(folder), "--to", str(out), "--png"]) != 0
    assert "is no" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "my own sheeprlhf report"
    (out / name).unlink()
    (out / name).symlink_to(tmp_path / "elsewhere")
    assert exit_code(["report", str(folder), "--to", str(out), "--png"]) != 0
    assert not (tmp_path / "elsewhere").exists()


BAD = [
    ("@/rum", ["@/rum does not exist", "did you mean @/run?"]),
    ("@/run/samples", ["a part of a run", "did you mean @/run?"]),
    ("@/run/config.yaml", ["a part of a run", "did you mean @/run?"]),
    ("@/empty", ["holds no run", "`list runs`"]),
    ("@/notes.txt", ["is not a folder"]),
    ("run=@/run", ["write `report @/run`"]),
    ("task=sft", ["write `report <run>`"]),
    ("@/run @/nowhere @/empty", ["@/nowhere does not exist", "@/empty holds no run"]),
    ("@/run --to", ["--to needs a value"]),
    ("@/run --to @/page.pdf", ["ends in .pdf", ".html"]),
    ("@/run --to @/notes.txt/page.html", ["notes.txt is not a folder"]),
    ("@/run --output x", ["no flag --output"]),
    ("--png", ["logs/runs", "`train task=sft`"]),
    (f"@/{'a' * 300}", ["does not exist"]),
]


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line[:20] for line, _ in BAD])
def test_bad_words_are_answered_in_one_message(line, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_past_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert exit_code(["report", *line.replace("@", str(tmp_path)).split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in expected:
        assert part.replace("@", str(tmp_path)) in printed.err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_summary_of_a_pipeline_comes_first(tmp_path, page_of):
    make_past_run(tmp_path / "chain" / "sft")
    results = [{"stage": "sft", "perplexity": 12.5, "seconds": 65.4, "odd": EVIL}, {"stage": EVIL, "seconds": 3}]
    (tmp_path / "chain" / "results.json").write_text(json.dumps(results))
    page = page_of(tmp_path / "chain")
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == ["pipeline", *SECTIONS]
    assert page.tables["Pipeline"][:2] == [["stage", "perplexity", "s"], ["sft", "12.50", "65"]]
    assert {tag for tag, _ in page.elements} <= ELEMENTS


@pytest.mark.parametrize("content", ["{", "[1]", '[{"stage": 1}]', "[" * 100_000, None])
def test_a_damaged_summary_is_left_out(content, tmp_path, page_of):
    make_past_run(tmp_path / "chain" / "sft")
    if content is None:
        (tmp_path / "away").write_text('[{"stage": "LEAKED", "seconds": 1}]')
        (tmp_path / "chain" / "results.json").symlink_to(tmp_path / "away")
    else:
        (tmp_path / "chain" / "results.json").write_text(content)
    page = page_of(tmp_path / "chain")
    assert "Pipeline" not in page.tables and "LEAKED" not in page.text


def test_few_values_are_a_table_instead_of_a_curve(tmp_path, page_of):
    folder = make_past_run(tmp_path / "run")
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,val/loss,2.5,1.0\r\n4,val/loss,2.25,1.0\r\n")
    page = page_of(folder)
    labels = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("class") == "chart"]
    assert [label.partition(":")[0] for label in labels] == ["train/loss", "train/items"]
    assert page.row("1 more number", "val/loss") == ["2.500 at step 2, 2.250 at step 4"]


def test_calibrations_are_drawn_from_their_numbers(tmp_path, page_of):
    folder = make_past_run(tmp_path / "run", task="rm")
    good = {"predicted": 0.55, "right": 0.5, "pairs": 40}
    bad = [
        {"predicted": EVIL},
        {"predicted": 2.0, "right": 0.5, "pairs": 1},
        {"predicted": 0.5, "right": 0.5, "pairs": 0},
    ]
    write_evaluation(folder, "preference-test-final", task="preference", accuracy=0.5, calibration=[good, *bad])
    page = page_of(folder)
    labels = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("class") == "chart"]
    assert labels[0] == "55% predicted, 50% right"
    assert {tag for tag, _ in page.elements} <= ELEMENTS


def test_rounds_of_iterated_training_are_drawn(tmp_path, page_of):
    """Score against the KL summed over the chain of starts; two runs alone, or a run besides, are no rounds."""
    figures = [(0.422, 9.0), (0.652, 1.5), (0.742, 1.31)]
    folders = [tmp_path / "logs" / f"round{number}" for number in range(3)]
    for number, (folder, (score, kl)) in enumerate(zip(folders, figures, strict=True)):
        make_past_run(folder, number)
        if number:
            config = (folder / "config.yaml").read_text()
            start = f"task:\n  sft_experiment_dir: {folders[number - 1]}\n"
            (folder / "config.yaml").write_text(config.replace("task:\n", start))
        write_evaluation(folder, "reward-imperative-test-final", task="reward", score=score, kl=kl)

    def drawn(*chosen: Path) -> list[str]:
        of = [attributes for _, attributes in page_of(*chosen).elements if attributes.get("class") == "chart"]
        return [attributes["aria-label"] for attributes in of if "at KL" in attributes["aria-label"]]

    [label] = drawn(*folders)
    assert [part.split()[0] for part in label.split("score ")[1:]] == ["0.4220", "0.6520", "0.7420"]
    assert [part.split(";")[0] for part in label.split("at KL ")[1:]] == ["0", "1.500", "2.810"]
    assert drawn(*folders[:2]) == [] and drawn(folders[0], folders[2]) == []


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_a_browser_runs_no_script_of_a_sample_and_shows_all_sections(tmp_path, page_of):
    """Also without the policy that forbids scripts: a copy of the page with a script of ours, which measures it."""
    page_of(_fill_with(tmp_path / "run", EVIL), make_past_run(tmp_path / "other"))
    assert BROWSER is not None
    source = (tmp_path / "page.html").read_text()
    measure = """<script>
        document.body.dataset.wide = document.documentElement.scrollWidth
        document.body.style.width = "420px"  // as on a phone; no window is that narrow
        const runs = document.querySelector("#runs .scroll")
        document.body.dataset.hidden = runs.scrollWidth - runs.clientWidth
        </script></body>"""
    open_page = tmp_path / "open.html"
    open_page.write_text(
        re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", source).replace("</body>", measure)
    )
    shown = dump_dom(BROWSER, tmp_path / "page.html", tmp_path / "profile")
    measured = dump_dom(BROWSER, open_page, tmp_path / "profile", width=500)
    for dom in (shown, measured):
        assert re.findall(r"<section id=\"(\w+)\"", dom) == SECTIONS
        assert "SheepRLHF</title>" in dom
        assert "<title>ran" not in dom
        assert dom.count("<svg") > 8
    assert "data-wide" not in shown
    assert int(re.findall(r'data-wide="(\d+)"', measured)[0]) <= 500  # only tables scroll sideways
    assert int(re.findall(r'data-hidden="(\d+)"', measured)[0]) == 0  # but not that of two runs


def curve(values: list[float], first: int = 0) -> Curve:
    return Curve([first + number for number in range(len(values))], values, [0.0] * len(values))


def points_of(svg: str) -> list[tuple[float, float]]:
    """The points of the first run's line."""
    path = re.search(r'd="(M[^"]*)" style="fill: none; stroke: var\(--run0\)', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path[1])]


def test_points_are_drawn_to_scale():
    [svg] = draw_curves([{0: curve([0.0, 1.0, 4.0])}])
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-3)
    assert (y0 - y2) == pytest.approx(4 * (y0 - y1), abs=1e-3)


def test_thinning_loses_no_extreme_and_no_mean():
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(1_000)]
    values[503] = 99.0
    line = downsample(curve(values))
    assert len(line.means) == 167  # six points each, four in the last
    assert max(line.highs) == 99.0 and min(line.lows) == min(values)
    counts = [6] * 166 + [4]
    assert math.fsum(m * n for m, n in zip(line.means, counts, strict=True)) == pytest.approx(math.fsum(values))
    assert all(low <= mean <= high for low, mean, high in zip(line.lows, line.means, line.highs, strict=True))
    few = downsample(curve(values[:180]))
    assert few.means == few.lows == few.highs == values[:180]


@pytest.mark.parametrize("values", [[0.0] * 3, [3.5] * 3, [-1e-12] * 3, [1e12] * 3, [1e299, -1e299, 0.0]])
def test_flat_and_huge_curves_have_a_chart(values):
    [svg] = draw_curves([{0: curve(values)}])
    assert "nan" not in svg.lower() and "inf" not in svg.lower()


@pytest.mark.parametrize(
    ("right", "pairs", "expected"),
    [(0.5, 100, (0.4038, 0.5962)), (1.0, 10, (0.7225, 1.0)), (0.0, 1, (0.0, 0.7935))],  # statsmodels, method="wilson"
)
def test_intervals_of_shares(right, pairs, expected):
    assert wilson(right, pairs) == pytest.approx(expected, abs=1e-4)


def test_a_share_of_all_or_none_is_inside_of_its_interval_whatever_rounding():
    for pairs in range(1, 200):
        assert wilson(1.0, pairs)[1] == 1.0
        assert wilson(0.0, pairs)[0] == 0.0


def test_tags_are_grouped_what_tells_most_first():
    tags = ["train/lr", "val/length", "rewards/mean", "objective/kl", "train/loss", "val/rewards/margins", "val/kl"]
    assert [(group.title, group.tags, group.open) for group in group_tags(tags)] == [
        ("Loss", ["train/loss"], True),
        ("Objective", ["objective/kl", "val/kl"], True),
        ("Rewards", ["rewards/mean", "val/rewards/margins"], True),
        ("Validation", ["val/length"], False),
        ("Training", ["train/lr"], False),
    ]


def test_losses_of_different_tasks_have_charts_of_their_own():
    a, b = curve([1.0] * 3), curve([2.0] * 3)
    runs = [{"train/loss": a, "val/kl": a}, {"train/loss": b, "val/kl": b}, {"train/loss": a, "val/kl": curve([1, 2])}]
    assert charts_of(["train/loss", "val/kl"], ["sft", "dpo", "sft"], runs) == {
        "train/loss of sft": {0: a, 2: a},
        "train/loss of dpo": {1: b},
        "val/kl": {0: a, 1: b},
    }
    assert list(charts_of(["train/loss"], ["sft"] * 3, runs)) == ["train/loss"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (3, "3"),
        (12345, "12,345"),
        (4.0, "4"),
        (2.8, "2.800"),
        (-0.734, "-0.7340"),
        (31.339, "31.34"),
        (123456.7, "123,457"),
        (1000.5, "1,000.5"),
        (999.96, "1000"),
        (5e-5, "5.00e-05"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_for_people(value, expected):
    assert figure_text(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, "-"), (0.25, "0.2 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_times_for_people(seconds, expected):
    assert duration_text(seconds) == expected
