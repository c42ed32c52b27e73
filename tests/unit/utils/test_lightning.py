"""Fabric is imported without PyTorch Lightning, and Lightning is whole again for whoever wants it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "sheeprlhf"
ALONE = """
import sys
from sheeprlhf.utils.lightning import Fabric, is_wrapped
Fabric(accelerator="cpu", devices=1).launch()
print([name for name in ("lightning.pytorch", "torchmetrics", "matplotlib") if name in sys.modules])
"""
AFTERWARDS = (
    "import lightning as l; print(l.__version__[0] == '2' and l.Fabric is Fabric, l.Trainer.__name__)",
    "import lightning.pytorch as p; print(p.utilities.rank_zero_only.rank == 0, p.Trainer.__name__)",
    "import torchmetrics; print(torchmetrics.MeanMetric is not None, 'Trainer')",
)


# Each in a process that has done no more than ALONE.
FORKS = """
import json, os
for program in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if not (pid := os.fork()):
        exec(program)
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        print("it failed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("afterwards", [AFTERWARDS[:1], pytest.param(AFTERWARDS[1:], marks=pytest.mark.nightly)])
def test_fabric_is_imported_without_lightning_which_is_whole_afterwards(afterwards: tuple[str, ...]) -> None:
    words = [sys.executable, "-c", ALONE + FORKS, json.dumps(afterwards)]
    done = subprocess.run(words, cwd=PACKAGE.parent, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["[]", *["True Trainer"] * len(afterwards)]
