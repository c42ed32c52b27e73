"""FSDP2, and DDP with adapters, on two gloo processes against one: losses, gradient norms, weights and optimizer.

One launch trains everything: the tasks' own `train` functions, on two Fabrics that share the processes. DDP of whole
models is compared in test_tasks.py.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from sheeprlhf.config.registry import to_typed
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.launch import _entry, _seed
from sheeprlhf.structure.fabric import FabricConfig
from tests.support.models import make_model_folder
from tests.support.runs import WRITERS, figures, train, train_words
from tests.unit.config.test_registry import composed
from tests.unit.engine.toy import on_ranks

STEPS = 5  # the last one has a single row, so that one of two processes has none
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4"]
RUNS: dict[str, tuple[str, str, int, list[str]]] = {  # task, strategy, rows of a forward pass, more words
    "sft fsdp2": ("sft", "fsdp2", 4, []),
    "sft fsdp2 accumulating": ("sft", "fsdp2", 1, []),
    "rm fsdp2 accumulating": ("rm", "fsdp2", 1, []),
    "dpo fsdp2 accumulating": ("dpo", "fsdp2", 1, []),
    "dpo fsdp2 lora": ("dpo", "fsdp2", 4, LORA),
    "dpo ddp lora": ("dpo", "ddp", 4, LORA),
}
SAME = ["task.mini_batch_size=8", "task.epochs=1", f"task.eval_interval={STEPS}", f"task.save_interval={STEPS}"]


def train_all(_: Any, folder: Path) -> None:
    """Both ranks: every run, in the folder of its name."""
    for name, (task, strategy, rows, extra) in RUNS.items():
        fabric = make_fabric(FabricConfig(devices="2", strategy=strategy))
        fabric.launch()
        words = train_words(folder / "model", folder / f"{task}.jsonl", folder / name, *SAME, *extra, task=task)
        words += [f"task.micro_batch_size={rows}", f"data.cache_dir={folder / 'cache'}", "resume=true"]
        config = to_typed(composed("train", *(word for word in words[1:] if not word.startswith("hydra.run.dir"))))
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "run.json").write_text('{"status": "running", "started": 0.0}')
        fabric.barrier()
        _seed(config, on_cuda=False)
        _entry(config.task.entry_point)(fabric, config, folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    make_model_folder(folder / "model", "llama")
    for task in ("sft", "rm", "dpo"):
        data = WRITERS[task](folder / f"{task}.jsonl", 33)
        train(folder / "model", data, folder / task, *SAME, "task.micro_batch_size=8", task=task)
    train(folder / "model", data, folder / "dpo lora", *SAME, "task.micro_batch_size=8", *LORA, task="dpo")
    on_ranks(2, train_all, folder, timeout=900)  # on an idle machine about 20 seconds
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name: str, folder: Path) -> None:
    task, *_, extra = RUNS[name]
    ours, expected = folder / name, folder / (f"{task} lora" if extra else task)
    for tag in ("train/loss", "train/grad_norm"):
        found, wanted = figures(ours)[tag], figures(expected)[tag]
        assert len(wanted) == STEPS
        assert_close(found, wanted, rtol=0, atol=1e-5)
    [final] = (expected / "final").glob("*model.safetensors")
    assert_close(load_file(ours / "final" / final.name), load_file(final), rtol=0, atol=1e-5)
    states = (load_file(run / "checkpoints" / f"step-{STEPS}" / "optimizer.safetensors") for run in (ours, expected))
    assert_close(*states, rtol=0, atol=1e-5)
