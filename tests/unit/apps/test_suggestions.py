"""A mistyped word is answered with what it may have meant, wherever it stands."""

import pytest

from sheeprlhf.cli import run
from sheeprlhf.config.option_checks import near_path

# words of the command line; what its message must contain
MEANT = [
    ("perplexity", ["did you mean `eval task=perplexity`?"]),
    ("OPT", ["did you mean `train task=sft model=opt`?"]),
    ("auto", ["`train task=sft model=auto` or `train task=sft fabric=auto`"]),
    ("--cfg job eval", ["write `eval --cfg ...`"]),
    ("train --mini-batch-size task=sft", ["write task.mini_batch_size=<value>"]),
    ("train --multirn task=sft", ["did you mean --multirun?"]),
    ("train -x task=sft", ["there is no flag -x; `train --help` lists all"]),
    ("train task=sft --info=plugin", ["did you mean plugins?"]),
    ("train -sc install=bsh", ["did you mean install=bash?"]),
    ("train task=sft epochs", ["did you mean task.epochs=<value>?"]),
    ("train task=sft hydra.run.dri=x", ["there is no option hydra.run.dri: did you mean hydra.run.dir?"]),
    ("fetch data=local", ["there is no option data", "`train`, `eval`, `inspect`, `doctor` have data"]),
    ("train task=sft resume_from=logs", ["did you mean resume_from=logz?", "`list runs`"]),
    ("train task=sft data=local data.train_file=rows.jsnl", ["did you mean data.train_file=rows.jsonl?"]),
]


@pytest.mark.parametrize(("line", "expected"), MEANT, ids=[line for line, _ in MEANT])
def test_the_nearest_is_named(line, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logz").mkdir()
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(SystemExit) as stop:
        run(line.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    for part in expected:
        assert part in printed.err
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("line", ["train --hf-token verysecret", "train --api_key=verysecret", "hf_token=verysecret"])
def test_a_secret_written_as_a_flag_is_not_repeated(line, capsys):
    with pytest.raises(SystemExit) as stop:
        run(line.split())
    assert stop.value.code == 2
    assert "verysecret" not in capsys.readouterr().err


def test_a_neighbour_s_name(tmp_path):
    (tmp_path / "chat.jsonl").touch()
    assert near_path(str(tmp_path / "chat.json")) == str(tmp_path / "chat.jsonl")
    assert near_path(str(tmp_path / "zzz")) is None
    assert near_path(str(tmp_path / "no" / "chat.jsonl")) is None
    assert near_path("/") is None
