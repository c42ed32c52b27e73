"""Help and errors answer at once: nothing heavy is imported for them."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "datasets", "lightning", "peft", "numpy", "pandas", "pyarrow")
PROGRAM = """
import sys
from sheeprlhf.cli import run
try:
    run(sys.argv[1:])
except SystemExit as stop:
    print("code", stop.code)
print("heavy", [name for name in {heavy} if name in sys.modules])
"""


def cpu_seconds() -> float:
    """Of this process's children: unlike the clock, it does not count what a busy machine does besides."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "train --help",
        "list runs",
        "show model=opt lr train",
        "train task=sft --cfg job",
        "train task=sft fabric=auto_cuda optim.lr=abc",
    ],
)
def test_help_and_errors_are_quick_and_light(line, tmp_path):
    start = cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *line.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    seconds = cpu_seconds() - start
    assert "heavy []" in done.stdout, done.stdout + done.stderr
    assert seconds < 2  # about 0.4 s
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", [["sheeprlhf.py"], ["-m", "sheeprlhf"]])
def test_script_and_module_start_alike(start):
    done = subprocess.run([sys.executable, *start], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "Commands:" in done.stdout
    assert "train" in done.stdout


def test_the_console_script_is_the_same_function():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["sheeprlhf"] == "sheeprlhf.cli:run"
