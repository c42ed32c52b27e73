"""What the kill campaign runs: each task as a whole model, with adapters, accumulating, on two processes."""

from typing import NamedTuple

LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.lora_cfg.dropout=0.1"]
PPO = ["task.adaptive_kl_coeff=true", "reward.normalize=true"]


class Scenario(NamedTuple):
    """A task, more words of its command, and how many processes train."""

    task: str
    words: list[str]
    processes: int = 1


SCENARIOS = {
    "sft, found by root_dir": Scenario("sft", []),
    "kto, lora": Scenario("kto", LORA),
    "grpo": Scenario("grpo", []),
    "grpo, lora": Scenario("grpo", LORA[:2]),
    "grpo, two processes": Scenario("grpo", [], processes=2),
    "sft, bf16": Scenario("sft", ["fabric.precision=bf16-mixed"]),
    "dpo, bf16": Scenario("dpo", ["fabric.precision=bf16-mixed"]),
    "ppo, all together, two processes": Scenario(
        "ppo", [*LORA[:2], *PPO, "task.ema_decay=0.9", "task.micro_batch_size=1"], processes=2
    ),
}
for _task in ("sft", "rm", "dpo", "ppo"):
    _lora = LORA[:2] if _task == "ppo" else LORA  # it refuses dropout: a ratio of probabilities would mean nothing
    _plain = [*PPO, "task.ema_decay=0.9"] if _task == "ppo" else []
    SCENARIOS[_task] = Scenario(_task, _plain)
    SCENARIOS[f"{_task}, lora"] = Scenario(_task, _lora)
    SCENARIOS[f"{_task}, lora, accumulating"] = Scenario(_task, [*_lora, "task.micro_batch_size=1"])
    SCENARIOS[f"{_task}, two processes"] = Scenario(_task, _plain, processes=2)
