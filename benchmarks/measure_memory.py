"""How much the peak memory of a real training run grows from the moment its model loads, beside what `doctor` plans.

    python benchmarks/measure_memory.py task=sft model=tiny data=local data.train_file=<long rows> task.max_num_steps=3

The first word is the task: sft, rm or dpo. The plan is for rows as long as `data.max_length`, of pairs for two such
responses after a short prompt: give such rows, or read the ratio as an upper bound. Linux, one process, on the CPU.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from sheeprlhf.cli import run
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task import loop, models
from sheeprlhf.task.scale_plan import step_plan


def status(name: str) -> int:
    """Bytes that the kernel tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def main() -> None:
    """Run the training, then print one line of JSON, in megabytes."""
    task: Any = importlib.import_module(f"sheeprlhf.task.train.{sys.argv[1].removeprefix('task=')}")
    load, train = loop.load_initial_policy, task.train
    before: list[int] = []
    configs: list[TrainConfig] = []

    def noted_load(*words: Any, **options: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before.append(status("VmRSS"))
        return load(*words, **options)

    def noted_train(fabric: Any, cfg: TrainConfig, run_dir: Path) -> Any:
        configs.append(cfg)
        return train(fabric, cfg, run_dir)

    loop.load_initial_policy = models.load_initial_policy = noted_load
    task.train = noted_train
    run(["train", *sys.argv[1:]])
    measured = status("VmHWM") - before[0]
    plan = step_plan(configs[0], device="cpu")
    planned = plan.total() - plan.libraries
    figures = {"before": before[0], "measured": measured, "planned": planned, **plan._asdict()}
    print(json.dumps({"ratio": round(planned / measured, 3)} | {k: round(v / 1e6) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
