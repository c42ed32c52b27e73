"""DDP and FSDP2 on two gloo processes against one process: losses, gradient norms and weights of every training task.

One launch trains everything: the tasks' own `train` functions, on two Fabrics that share the processes.
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
from tests.distributed.test_sft import series
from tests.support.models import make_model_folder
from tests.support.runs import WRITERS, train_words
from tests.unit.config.test_registry import composed
from tests.unit.engine.toy import on_ranks

TASKS = ("sft", "rm", "dpo")
ACCUMULATIONS = (1, 4)
STRATEGIES = ("ddp", "fsdp2")
STEPS = 10
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4"]
TIMEOUT = 900  # seconds; on an idle machine about 40


def train_in(fabric: Any, folder: Path, task: str, name: str, *extra: str) -> None:
    """One run of 10 steps in `folder/name`; every 5th step has a single row, so that one of two processes has none."""
    words = train_words(folder / "model", folder / f"{task}.jsonl", folder / name, *extra, task=task)
    words += [
        "task.mini_batch_size=8",
        "task.epochs=2",
        f"task.eval_interval={STEPS}",
        f"task.save_interval={STEPS}",
        f"data.cache_dir={folder / 'cache'}",
        "resume=true",
    ]
    own = [word for word in words[1:] if not word.startswith("hydra.run.dir")]
    config = to_typed(composed("train", *own))
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "run.json").write_text('{"status": "running", "started": 0.0}')
    fabric.barrier()
    _seed(config, on_cuda=False)
    _entry(config.task.entry_point)(fabric, config, folder / name)


def train_all(_: Any, folder: Path, strategies: tuple[str, ...]) -> None:
    size = str(2 if len(strategies) > 1 else 1)
    for strategy in strategies:
        fabric = make_fabric(FabricConfig(devices=size, strategy=strategy))
        fabric.launch()
        for task in TASKS:
            for accumulation in ACCUMULATIONS if size == "2" else (1,):
                rows = 8 // int(size) // accumulation
                name = f"{task}-{strategy}-{accumulation}"
                train_in(fabric, folder, task, name, f"task.micro_batch_size={rows}")
        train_in(fabric, folder, "dpo", f"lora-{strategy}", *LORA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    make_model_folder(folder / "model", "llama")
    for task in TASKS:
        WRITERS[task](folder / f"{task}.jsonl", 33)
    on_ranks(2, train_all, folder, STRATEGIES, timeout=TIMEOUT)
    on_ranks(1, train_all, folder, ("auto",), timeout=TIMEOUT)
    return folder


def assert_same(ours: Path, expected: Path) -> None:
    for tag in ("train/loss", "train/grad_norm"):
        found, wanted = series(ours, tag), series(expected, tag)
        assert len(wanted) == STEPS
        assert_close(found, wanted, rtol=0, atol=1e-5)
        assert abs(float((found - wanted).mean())) <= 1e-6, tag  # no drift to one side
    [final] = (expected / "final").glob("*model.safetensors")
    assert_close(load_file(ours / "final" / final.name), load_file(final), rtol=0, atol=1e-5)
    states = (load_file(run / "checkpoints" / f"step-{STEPS}" / "optimizer.safetensors") for run in (ours, expected))
    assert_close(*states, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one(task: str, strategy: str, accumulation: int, folder: Path) -> None:
    assert_same(folder / f"{task}-{strategy}-{accumulation}", folder / f"{task}-auto-1")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_too(strategy: str, folder: Path) -> None:
    assert_same(folder / f"lora-{strategy}", folder / "lora-auto")
