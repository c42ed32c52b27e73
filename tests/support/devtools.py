"""A page in a headless Chromium, driven through a pipe by the DevTools protocol; needs no package."""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Page:
    """A `with` block around one tab. What it asked for and from whom is in `requests`, its complaints in `console`.

    Args:
        chromium: the program.
        profile: an empty folder of its own.
        width, height: of the window, in pixels.
    """

    def __init__(self, chromium: str, profile: Path, width: int = 1280, height: int = 900) -> None:
        self.requests: list[str] = []
        self.console: list[str] = []
        self._size = (width, height)
        self._command = [
            chromium,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        self._number, self._buffer, self._session = 0, b"", ""

    def __enter__(self) -> "Page":
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()

        def hand_over() -> None:  # Chromium reads from 3 and writes to 4
            read, write = os.dup(to_read), os.dup(to_write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=hand_over,
            close_fds=False,
        )
        os.close(to_read)
        os.close(to_write)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(*self._size)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> Any:
        """One command, and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 180
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0], "Chromium does not answer"
            part = os.read(self._in, 1 << 16)
            assert part, "Chromium has ended"
            self._buffer += part
        first, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(first)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.console.append(str(event["params"]["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.console.append(str(event["params"]["entry"]))

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, accept: Callable[[Any], Any] = bool, seconds: float = 180) -> Any:
        """The value of an expression as soon as it is accepted."""
        deadline = time.monotonic() + seconds
        while not accept(value := self.js(expression)):
            assert time.monotonic() < deadline, f"{expression} stayed {value!r}; {self.console}"
            time.sleep(0.05)
        return value

    def fill(self, selector: str, text: str) -> None:
        """Type into a field, as soon as it is there."""
        self.wait(f"!!document.querySelector({selector!r})")
        self.js(f"document.querySelector({selector!r}).focus(); document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Press it as soon as it is there: a page is built piece by piece."""
        self.wait(f"!!document.querySelector({selector!r})")
        self.js(f"document.querySelector({selector!r}).click()")


_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """The program, if there is one on PATH."""
    return next((found for found in map(shutil.which, _NAMES) if found), None)


def dump_dom(browser: str, page: Path, profile: Path, *, width: int = 1200) -> str:
    """What a page has become once it is loaded and its scripts, if it has any, have run."""
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]  # root has no sandbox
    places = [f"--user-data-dir={profile}", f"--window-size={width},900", page.resolve().as_uri()]
    done = subprocess.run([browser, *words, "--dump-dom", *places], capture_output=True, timeout=120, check=True)
    return done.stdout.decode()
