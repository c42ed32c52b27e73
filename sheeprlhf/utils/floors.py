"""Versions of libraries that must not run: known to be malicious, or to run code from files. Told before they load."""

import importlib.metadata
import re

from sheeprlhf.utils.errors import ConfigError

BANNED = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}  # stole secrets on import
FLOORS = {
    "lightning": "2.6.6",  # CVE-2026-58659
    "hydra-core": "1.3.8",  # CVE-2026-68508
    "transformers": "5.10.0",  # CVE-2026-9856, CVE-2026-5241, CVE-2026-4372
    "torch": "2.10.0",  # CVE-2025-32434, CVE-2026-24747
    "datasets": "5.0.1",  # PYSEC-2026-3716
    "jinja2": "3.1.6",  # CVE-2025-27516: the sandbox of chat templates
}
_NUMBERS = re.compile(r"\d+")


def check_versions() -> None:
    """Refuse to go on with such a version; an absent library is told by who needs it.

    Raises:
        ConfigError: naming all of them and what to install.
    """
    problems = []
    for name in sorted(FLOORS.keys() | BANNED.keys()):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        problem = version_problem(name, version)
        problems += [problem] if problem else []
    if problems:
        raise ConfigError(*problems)


def version_problem(name: str, version: str) -> str:
    """Why this version of a library must not run; empty if it may.

    Args:
        name: as the package index knows it, in small letters.
        version: what is installed, "2.6.6" or "2.13.0+cpu".
    """
    floor = FLOORS.get(name)
    public = version.partition("+")[0]
    instead = f"pip install '{name}>={floor}'" if floor else f"pip uninstall {name}"
    if public in BANNED.get(name, ()):
        return (
            f"{name} {version} is malicious: it steals secrets of the machine that imports it; `{instead}` and renew "
            "the secrets of this machine"
        )
    if floor and _numbers(public) < _numbers(floor):
        return f"{name} {version} has known holes through which a file can run code: `{instead}`"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBERS.findall(version)[:3])
