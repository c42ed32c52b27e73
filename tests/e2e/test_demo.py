"""The demo's page in a real browser, what its server gives away, and what is refused before it starts."""

import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sheeprlhf.apps.demo import AUTH, open_page, short_names
from sheeprlhf.config.model_lookup import find_trained
from tests.support.devtools import Page, find_chromium
from tests.support.runs import rejected
from tests.support.talking import says

EVIL = "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>[x](javascript:window.hit=3) **bold**"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(folders: dict[str, Path], auth: tuple[str, str] | None = None) -> Iterator[str]:
    from sheeprlhf.apps.demo_page import ASK, SUMMARISE, Panel
    from sheeprlhf.task.text_generator import load_text_generator

    writers = [(name, load_text_generator(find_trained(str(folder)), print)) for name, folder in folders.items()]
    port = free_port()
    page = open_page([Panel(kind, writers, None) for kind in (SUMMARISE, ASK)], None, "127.0.0.1", port, auth)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        page.close(verbose=False)


def status(url: str, **headers: str) -> int:
    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None

    opener = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler({}))
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code


def listening(port: int) -> set[str]:
    """Local addresses on which somebody listens at this port, of IPv4 and IPv6."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, hexadecimal = local.rpartition(":")
            if state == "0A" and int(hexadecimal, 16) == port:
                found.add(address)
    return found


@pytest.mark.slow
def test_the_server_gives_the_page_and_nothing_else(model_folder, monkeypatch):
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")  # what a user's shell may have set
    with served({"one": model_folder("llama")}) as url:
        assert status(f"{url}/") == 200
        assert listening(int(url.rpartition(":")[2])) == {"0100007F"}  # 127.0.0.1 alone
        assert status(f"{url}/file=/etc/passwd") == 404
        page = urllib.request.urlopen(f"{url}/").read().decode()
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?https?://(?!127)", page)
    with served({"one": model_folder("llama")}, ("me", "long enough")) as url:
        assert status(f"{url}/config") == 401


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_in_a_browser(model_folder, tmp_path, monkeypatch):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    prompts = says(monkeypatch, EVIL, "the second model's answer")
    models = {"first": model_folder("llama"), "second": model_folder("gpt2")}
    answers = "[...document.querySelectorAll('#summarise-answer-{} textarea')].map(x => x.value)[0]"
    state = "document.querySelector('#summarise-status textarea').value"
    with served(models) as url, Page(chromium, tmp_path / "profile") as page:
        page.open(url)
        page.wait("!!document.querySelector('#summarise-prompt textarea')")
        page.click("#summarise-go")  # nothing was typed
        page.wait(state, lambda text: "the prompt is empty" in text)
        page.fill("#summarise-prompt textarea", "x" * 200)
        page.click("#summarise-go")
        page.wait(state, lambda text: "first: the prompt has" in text and "second: the prompt has" in text)
        assert prompts == []
        page.fill("#summarise-prompt textarea", "A post.")
        page.click("#summarise-go")
        page.wait(state, lambda text: text == "done")
        assert page.js(answers.format(0)) == EVIL
        assert page.js(answers.format(1)) == "the second model's answer"
        assert prompts == ["<s>A post.\nTL;DR:"] * 2
        assert page.js("window.hit") is None
        assert page.js("document.querySelectorAll('script:not([src]), img').length") == page.js(
            "[...document.querySelectorAll('script:not([src]), img')].filter(x => !/hit/.test(x.outerHTML) || "
            "/gradio_config/.test(x.outerHTML)).length"
        )
        assert {re.match(r"\w+://[^/]*", request)[0] for request in page.requests if request[:4] == "http"} == {url}
        assert page.console == []
        page.resize(390, 844)
        assert page.wait("document.documentElement.scrollWidth", lambda width: width <= 390)


def refused(capsys, *words: str) -> str:
    return rejected(["demo", *words], capsys)


def test_a_port_that_is_taken_is_answered_with_a_free_one(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert re.search(
            rf"--port {port} cannot be used .*: give another one, as --port \d+",
            refused(capsys, "tiny", f"--port={port}"),
        )


def test_others_are_not_let_in_without_a_password(capsys, monkeypatch):
    port = f"--port={free_port()}"
    for host in ("0.0.0.0", "::", "192.168.0.1"):
        assert "--auth" in refused(capsys, "tiny", "--host", host, port)
    assert "address" in refused(capsys, "tiny", "--host", "everywhere", port)
    for given in ("", "me", "me:short", ":long enough"):
        monkeypatch.setenv(AUTH, given)
        assert f"set {AUTH} to user:password" in refused(capsys, "tiny", "--host", "0.0.0.0", "--auth", port)


@pytest.mark.parametrize("words", [["--auth", "me:sesame123"], ["--auth=me:sesame123"], ["--auth=sesame123"]])
def test_a_password_on_the_command_line_is_refused_and_not_shown(words, capsys):
    printed = refused(capsys, "tiny", *words)
    assert AUTH in printed and "sesame" not in printed


def test_all_mistakes_are_reported_at_once(capsys, model_folder):
    printed = refused(capsys, "nowhere", "tiny", "--reward", str(model_folder("llama")), "--host", "0.0.0.0")
    assert all(word in printed for word in ("nowhere", "--host 0.0.0.0", "--reward: "))
    assert "one to 6 runs" in refused(capsys)
    assert "7 were given" in refused(capsys, *["tiny"] * 7)
    assert "--port" in refused(capsys, "tiny", "--prot", "1")


def test_without_the_package_the_answer_is_one_line(tmp_path):
    program = (
        "import sys\nsys.modules['gradio'] = None\nsys.meta_path.insert(0, type('F', (), {'find_spec': "
        "staticmethod(lambda name, path=None, target=None: None)}))\nfrom sheeprlhf.cli import run\n"
        "try:\n    run(['demo', 'tiny'])\nexcept SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "2 False\n"
    assert done.stderr.splitlines()[1:] == [
        '  - `demo` needs a package that is not installed (gradio): pip install "sheeprlhf[demo]"'
    ]


def test_names_are_as_long_as_they_must_be():
    assert short_names(["/a/b/run", "/a/c/run"]) == ["b/run", "c/run"]
    assert short_names(["/a/run", "/b/other/"]) == ["run", "other"]
    assert short_names(["x"]) == ["x"]
    runs = [f"logs/runs/docstrings/tiny/{task}/2026-11-30_16-00-00/default" for task in ("sft", "dpo")]
    assert short_names(runs[:1]) == ["sft/2026-11-30_16-00-00/default"]
    assert short_names(runs) == ["sft/2026-11-30_16-00-00/default", "dpo/2026-11-30_16-00-00/default"]
    assert short_names([runs[0], "tiny"]) == ["sft/2026-11-30_16-00-00/default", "tiny"]
    assert short_names([f"{runs[0]} (best)"]) == ["sft/2026-11-30_16-00-00/default (best)"]
    assert short_names(["default"]) == ["default"]
    assert short_names(["x", "x"]) == ["x #1", "x #2"]
