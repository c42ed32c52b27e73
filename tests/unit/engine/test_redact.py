import html

import pytest
import yaml
from tensorboard.plugin_util import markdown_to_safe_html

from sheeprlhf.engine.redact import code_block, plain_text, redact, redact_command, redact_text

SECRETS = [
    "hf_abcdefGHIJ1234567890",
    "sk-proj-abcdef123456",
    "ghp_abcdefghijklmnop1234",
    "github_pat_11ABCDEFG0abcdef",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_keys_are_hidden_wherever_they_are(secret):
    for text in (secret, f"x={secret}", f"https://host/a?b={secret}&c=1", f"a {secret}, b"):
        assert secret not in redact_text(text)
        assert secret not in yaml.safe_dump(redact({"data": {"files": [text, {"x": text}]}}))
        assert secret not in " ".join(redact_command(["train", f"data.train_file={text}", text]))


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
