"""Versions of libraries that must not run, as malware or as a way to run code from files; reported before they load."""

import importlib.metadata

from packaging.version import Version

from sheeprlhf.utils.errors import ConfigError

BANNED = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}  # stole secrets on import
FLOORS = {
    "lightning": "2.6.6",  # CVE-2026-58659
    "hydra-core": "1.3.8",  # CVE-2026-68508
    "transformers": "5.10.0",  # CVE-2026-9856, CVE-2026-5241, CVE-2026-4372
    "torch": "2.11.0",  # CVE-2025-32434, CVE-2026-24747; 2.10.0 is the last of PYSEC-2026-139
    "datasets": "5.0.1",  # PYSEC-2026-3716
    "jinja2": "3.1.6",  # CVE-2025-27516: the sandbox of chat templates
    "gradio": "6.31.0",  # below 6.16 GHSA-j36p-7w88-g82j and others; 6.17.3 redirects anywhere, its cure is not known
}
OPTIONAL = frozenset({"gradio"})  # of one command: what lies there unused stops no other


def check_versions(*used: str) -> None:
    """Reject versions that must not run, of `OPTIONAL` those `used`. Raises ConfigError with all of them."""
    problems = []
    for name in sorted((FLOORS.keys() | BANNED.keys()) - (OPTIONAL - set(used))):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        problem = version_problem(name, version)
        problems += [problem] if problem else []
    if problems:
        raise ConfigError(*problems)


def version_problem(name: str, version: str) -> str:
    """The reason to refuse a version of a library, such as "2.13.0+cpu"; empty if it is allowed."""
    floor = FLOORS.get(name)
    public = version.partition("+")[0]
    instead = f"pip install '{name}>={floor}'" if floor else f"pip uninstall {name}"
    if public in BANNED.get(name, ()):
        advice = f"`{instead}` and renew the secrets of this machine"
        return f"{name} {version} is malicious: it steals secrets of the machine that imports it; {advice}"
    if floor and Version(public) < Version(floor):
        return f"{name} {version} has known holes through which a file can run code: `{instead}`"
    return ""
