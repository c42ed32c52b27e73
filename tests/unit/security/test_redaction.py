import html
from pathlib import Path
from string import ascii_letters, digits
from time import process_time

import pytest
import yaml
from tensorboard.plugin_util import markdown_to_safe_html

from sheeprlhf.config.option_lookup import catalogue
from sheeprlhf.security.redaction import code_block, is_secret_value, plain_text, redact, redact_command, redact_text

LETTERS = f"{ascii_letters}{digits}"
SECRETS = [
    f"hf_{LETTERS[:34]}",
    f"sk-{LETTERS[:20]}T3BlbkFJ{LETTERS[:20]}",
    f"sk-proj-{LETTERS}-{LETTERS[:20]}_T3BlbkFJ{LETTERS}",
    f"sk-ant-api03-{LETTERS}_{LETTERS[:40]}AA",
    f"ghp_{LETTERS[:36]}",
    f"ghs_{LETTERS[:36]}",
    f"github_pat_{LETTERS[:22]}_{LETTERS[:59]}",
    f"glpat-{LETTERS[:20]}",
    "AKIAIOSFODNN7EXAMPLE",
    f"AIza{LETTERS[:35]}",
    f"xoxb-123456789012-1234567890123-{LETTERS[:24]}",
    f"wandb_v1_{LETTERS[:27]}_{LETTERS[:49]}",
    f"pypi-AgEIcHlwaS5vcmc{LETTERS}{LETTERS}",
    f"npm_{LETTERS[:36]}",
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.{LETTERS[:43]}",
]
NO_SECRETS = (
    "hf_projects /data/hf_datasets_cache/x hf_home_of_the_whole_team_in_this_place sk-learn sk-proj-2024 "
    "sk-experiments-of-november/run1 sk-ant-colony-simulation-with-many-words-in-its-name ghp_notes github_pat_notes "
    "xoxb-notes-of-a-meeting-in-november glpat-x pypi-x AKIA npm_modules eyJhbGci ssh://git@github.com/x "
    "http://host/x@y https://host?x=y@z"
).split()


@pytest.mark.parametrize("secret", SECRETS)
def test_keys_are_hidden_wherever_they_are(secret):
    for text in (secret, f"x={secret}", f"https://host/a?b={secret}&c=1", f"a {secret}, b"):
        assert secret not in redact_text(text)
        assert secret not in yaml.safe_dump(redact({"data": {"files": [text, {"x": text}]}}))
        assert secret not in " ".join(redact_command(["train", f"data.train_file={text}", text]))


@pytest.mark.parametrize("text", NO_SECRETS)
def test_names_that_only_begin_like_keys_are_none(text):
    assert redact_text(text) == text and not is_secret_value(f"root_dir={text}")


@pytest.mark.parametrize("secret", SECRETS)
def test_a_component_of_an_existing_path_is_no_secret(secret, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / secret / "with a space"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text in (folder, folder / "new", f"root_dir={folder}/new", f"{secret}/new", f'File "{folder}/a.py", line 3'):
        assert redact_text(str(text)) == str(text) and not is_secret_value(str(text))
    for text in (f"/nowhere/{secret}/x", f"{folder}/new/{secret}"):
        assert redact_text(text) != text and is_secret_value(text)


def test_a_value_of_the_environment_is_hidden_but_not_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROJECT_KEY", "project-2024")
    (tmp_path / "project-2024").mkdir()
    assert redact_text(f"{tmp_path}/project-2024/run, project-2024") == f"{tmp_path}/project-2024/run, <redacted>"


def test_long_texts_take_no_time():
    start = process_time()
    for part in ("a", "x-", "eyJ_", "xoxb-aaa-", "sk-", "://", "sk-proj-aaa-"):
        redact_text(part * (400_000 // len(part)))
    assert process_time() - start < 8


def test_passwords_in_urls():
    assert redact_text("https://me:pw@host/x") == "https://<redacted>@host/x"
    assert redact_text("https://host/x@y") == "https://host/x@y"


@pytest.mark.parametrize("key", ["hf_token", "API_KEY", "apiKey", "secret", "db_password", "aws_secret_access_key"])
def test_values_are_hidden_by_the_name_of_their_key(key):
    assert redact({"a": {key: "plain"}}) == {"a": {key: "<redacted>"}}
    assert redact({key: ["plain"]}) == {key: ["<redacted>"]}
    assert redact_command([f"+model.{key}=plain"]) == [f"+model.{key}=<redacted>"]


def test_options_are_not_secrets():
    options = {
        "token_budget": 2048,
        "max_new_tokens": 64,
        "top_k": 0,
        "lr": 1e-3,
        "flag": True,
        "none": None,
        "s": "sk-8",
    }
    assert redact(options) == options
    command = ["train", "task.token_budget=2048", "generation.max_new_tokens=6", "-m", "data=local", "optim.lr=1e-3"]
    assert redact_command(command) == command
    assert redact(("a", 1)) == ["a", 1]


def test_no_option_of_a_command_is_hidden():
    values = {entry.option.key: entry.option.value for entry in catalogue()}
    words = [f"{key}={str(value).lower() if isinstance(value, int | float) else 'x'}" for key, value in values.items()]
    assert "data.control_tokens=false" in words
    assert redact_command(words) == words


MARKUP = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![](http://h/x.png)",
    "</pre><img src=x onerror=y>",
    "`a`",
]


@pytest.mark.parametrize("text", MARKUP)
def test_markup_is_shown_and_not_obeyed(text):
    shown = markdown_to_safe_html(code_block(text))
    for tag in ("<script", "<a ", "<img"):
        assert tag not in shown
    assert text in html.unescape(shown)


def test_blank_lines_do_not_end_the_block():
    shown = markdown_to_safe_html(code_block("a\n\n# b\n\n    c"))
    assert "<h1>" not in shown
    assert "<code>" not in shown


def test_terminal_control_is_removed():
    bad = "a\x1b[31mred\x1b[0m \x1b]8;;http://h\x07link\x1b]8;;\x1b\\ \x9b31m\x00\x08\r\x7f\u202e b\tc\n\x1b"
    assert plain_text(bad) == "ared link 31m b\tc\n"
