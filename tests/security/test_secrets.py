"""Secrets of the environment, the command line and a .env file are in nothing that a run writes or prints."""

import os
import stat
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from sheeprlhf.security.redaction import redact_text
from tests.support.runs import exit_code, train_words, write_rows

ENVIRONMENT = {
    "HF_TOKEN": "hf_canaryOneOfTheEnvironmentABCDEFGHIJK",
    "WANDB_API_KEY": "canary2canary2canary2canary2",  # looks like nothing: hidden because of its name
    "AWS_SECRET_ACCESS_KEY": "canary3/with+signs/canary3==",
    "MY_DB_PASSWORD": "canary4-of-a-database",
    "OPENAI_API_KEY": "sk-canary5canary5canary5canary5canary5",
}
DOT_ENV = {
    "HF_TOKEN": "hf_canary6ofADotEnvFileABCDEFGHIJKLMNOPQ",
    "GITHUB_TOKEN": "ghp_canary7canary7canary7canary7canary71",
}
COMMAND_LINE = "ghp_canary8canary8canary8canary8canary81"
CANARIES = [*ENVIRONMENT.values(), *DOT_ENV.values(), COMMAND_LINE]


def seen(canaries: list[str], place: Path, *texts: str) -> list[str]:
    """Which canaries are in any file below a folder, or in a text."""
    contents = [path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != ".env"]
    contents += [text.encode() for text in texts]
    return [canary for canary in canaries if any(canary.encode() in content for content in contents)]


@pytest.fixture
def canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory but for a .env file; the environment has secrets."""
    place = tmp_path / "here"
    place.mkdir()
    (place / ".env").write_text("".join(f"{name}={value}\n" for name, value in DOT_ENV.items()))
    monkeypatch.chdir(place)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return place


def test_no_canary_is_in_what_a_run_leaves(canaries: Path, tmp_path: Path, model_folder, capsys) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    text = rows.read_text().replace("fox", f"{ENVIRONMENT['WANDB_API_KEY']} {ENVIRONMENT['HF_TOKEN']}")
    rows.write_text(text)  # so that samples show them
    words = train_words(model_folder(), rows, canaries / "run", "task.max_num_steps=2", "task.eval_interval=1")
    run([*words, "debug=true"])
    printed = capsys.readouterr()
    weights = {".safetensors", ".bin", ".arrow"}
    there = {path for path in (canaries / "run").rglob("*") if path.is_file() and path.suffix not in weights}
    assert {"config.yaml", "run.json", "metrics.csv"} <= {path.name for path in there}
    assert any("tfevents" in path.name for path in there)
    assert seen(CANARIES, canaries, printed.out, printed.err) == []
    assert os.environ["HF_TOKEN"] == ENVIRONMENT["HF_TOKEN"]  # nobody has read .env
    for path in [canaries / "run", *(canaries / "run").rglob("*")]:
        if path.is_dir() and path.parent == canaries:
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_no_canary_is_in_a_traceback(canaries: Path, tmp_path: Path, model_folder, monkeypatch, capsys) -> None:
    import sheeprlhf.launch as launch

    def fail(config: object, run_dir: Path) -> None:
        raise RuntimeError(f"refused with {os.environ['AWS_SECRET_ACCESS_KEY']} and \x1b]8;;http://h\x07{COMMAND_LINE}")

    monkeypatch.setattr(launch, "_run_task", fail)
    assert (
        exit_code([*train_words(model_folder(), write_rows(tmp_path / "rows.jsonl"), canaries / "run"), "debug=true"])
        != 0
    )
    printed = capsys.readouterr()
    assert "Traceback" in printed.err and "refused with <redacted>" in (canaries / "run" / "error.log").read_text()
    assert seen(CANARIES, canaries, printed.out, printed.err) == []
    assert "\x1b]" not in printed.err


WORDS = [
    f"run_name={COMMAND_LINE}",
    "+hf_token=canary-canary",
    "+model.api_key=canary-canary",
    "data.password=canary-canary",
    "hydra.job.env_set.HF_TOKEN=canary-canary",
    "my_token=canary canary",
    "data.dataset_name=https://me:canary-canary@host/x",
    "root_dir=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",
    "data.revision=AKIACANARYCANARY1234",
    "data.cache_dir=glpat-canarycanarycanary12",
    "model.repo_name=xoxb-123456789012-canarycanarycanary",
    "model.library_cfg.revision=pypi-AgEIcHlwaS5vcmccanarycanarycanarycanarycanarycanarycanarycanarycanarycanary",
]


def test_a_secret_on_the_command_line_is_refused_by_name(canaries: Path, capsys) -> None:
    assert exit_code(["train", "task=sft", *WORDS]) == 2
    printed = capsys.readouterr()
    assert "HF_TOKEN" in printed.err
    message = [line for line in printed.err.splitlines() if "credential" in line]
    for word in WORDS:
        assert sum(word.partition("=")[0].lstrip("+") in line for line in message) == 1, word
    assert "canary" not in (printed.out + printed.err).casefold()
    assert [path.name for path in canaries.iterdir()] == [".env"]


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/.cache/huggingface/token")
    monkeypatch.setenv("MAX_TOKENS", "2048")
    text = "false, 2048 of /home/me/.cache/huggingface/token, sk-learn, pypi-x, AKIA"
    assert redact_text(text) == text
