"""`docs/tour.ipynb`, executed from its first cell to its last."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
def test_the_tour_improves_the_reward() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = "".join(output.get("text", "") for output in outputs)
    rewards = {name: float(value) for name, value in re.findall(r"^(SFT|PPO|DPO): reward +(-?[\d.]+)", texts, re.M)}
    assert rewards["PPO"] > rewards["SFT"] and rewards["DPO"] > rewards["SFT"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
