"""A real browser to look at pages with, where the machine has one."""

import shutil
import subprocess
from pathlib import Path

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
