"""What TRL's trainers of online policies compute on fixed responses: writes `tests/golden/trl_rollouts.json`.

    PEER/python benchmarks/golden_trl_rollouts.py [--out FILE]

PEER is an environment with TRL. Responses, scores and the log-probabilities of the old policy and of the reference are
given, so that nothing is sampled: advantages come from each trainer's own code for scored responses, losses and
gradients from its `compute_loss`, once of all responses and once of each alone.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import golden_trl  # first: it sets the environment of the libraries
import torch
import transformers
import trl
from trl.rewards import get_soft_overlong_punishment

from tests.support.golden import CONFIG, ROLLOUTS_PATH, SEEDS, golden_model, golden_rollouts
from tests.support.models import PAD

MAX_LENGTH, OVERLONG = 16, (8, 3)
ADVANTAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("grpo", "GRPO", {"scale_rewards": "group"}),
    ("dr_grpo", "GRPO", {"scale_rewards": "none"}),
    ("rloo", "RLOO", {"beta": 0.0}),
    ("rloo, kl in the reward", "RLOO", {"beta": 0.05}),
]
LOSSES: list[tuple[str, str, dict[str, Any]]] = [
    ("grpo", "GRPO", {"loss_type": "grpo", "beta": 0.04, "epsilon": 0.2, "use_bias_correction_kl": False}),
    # TRL's default: the KL is multiplied by the ratio, with its gradient (DeepSeek-V3.2)
    ("grpo, kl times ratio", "GRPO", {"loss_type": "grpo", "beta": 0.04, "epsilon": 0.2}),
    ("grpo, no kl", "GRPO", {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.1}),
    ("dr_grpo", "GRPO", {"loss_type": "dr_grpo", "beta": 0.0, "epsilon": 0.2, "max_completion_length": MAX_LENGTH}),
    ("dapo", "GRPO", {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28}),
    ("rloo", "RLOO", {"beta": 0.0, "epsilon": 0.2}),
]


def trainer_of(kind: str, options: dict[str, Any], scores: list[float], group: int) -> Any:
    """A trainer whose reward function gives the scores in their order."""
    config = {"GRPO": trl.GRPOConfig, "RLOO": trl.RLOOConfig}[kind]
    batch = {"per_device_train_batch_size": len(scores), "num_generations": group}
    model = golden_model("policy")
    model.name_or_path = model.config._name_or_path = tempfile.mkdtemp()  # where it looks for a reference, unused here
    model.save_pretrained(model.name_or_path)
    trainer = {"GRPO": trl.GRPOTrainer, "RLOO": trl.RLOOTrainer}[kind](
        model=model,
        reward_funcs=lambda completions, **_: scores,
        args=golden_trl.settings(config, batch | options),
        train_dataset=golden_trl.unused_rows(prompt="w3 w4"),
        processing_class=golden_trl.tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def padded(rows: list[list[Any]], fill: float, left: bool = False) -> torch.Tensor:
    """A row each."""
    width = max(map(len, rows))
    pads = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])


def batch_of(rollouts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a trainer's `compute_loss` reads, but for log-probabilities."""
    prompts, responses = rollouts["prompt_ids"], rollouts["response_ids"]
    return {
        "prompt_ids": padded(prompts, PAD, left=True),
        "prompt_mask": padded([[1] * len(ids) for ids in prompts], 0, left=True),
        "completion_ids": padded(responses, PAD),
        "completion_mask": padded([[1] * len(ids) for ids in responses], 0),
        "advantages": torch.tensor(rollouts["advantages"]),
    }


def logprobs_of(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's, of each token of the responses."""
    ids, masks = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, masks, batch["completion_ids"].shape[1])[
            0
        ]


def advantages_of(name: str, kind: str, options: dict[str, Any], rollouts: dict[str, Any]) -> dict[str, Any]:
    """The trainer's advantages of all responses, and their log-probabilities by the policy and the reference."""
    trainer = trainer_of(kind, options, rollouts["scores"], rollouts["group"])
    batch = batch_of(rollouts)
    given = (logprobs_of(trainer, batch), padded(rollouts["reference_difference"], 0.0))
    answers = [given[0], given[0] + given[1]]
    prompts, responses = rollouts["prompt_ids"], rollouts["response_ids"]
    texts = ["w3"] * len(prompts)
    generated: tuple[Any, ...] = prompts, responses, texts
    if kind == "GRPO":
        generated = prompts, responses, None, texts, None, {}, None, None
    trainer._generate = lambda _: generated
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (answers.pop(0), None, None)
    found = trainer._generate_and_score_completions([{"prompt": "w3 w4"}] * len(prompts))
    return {"name": name, "trainer": f"{kind}Trainer", "options": options, "advantages": found["advantages"].tolist()}


def losses_of(name: str, kind: str, options: dict[str, Any], rollouts: dict[str, Any]) -> dict[str, Any]:
    """The trainer's loss of each response and of all."""
    trainer = trainer_of(kind, options, rollouts["scores"], rollouts["group"])
    batch = batch_of(rollouts)
    logprobs, mask = logprobs_of(trainer, batch), batch["completion_mask"]
    old = logprobs - padded(rollouts["old_difference"], 0.0)
    batch["old_per_token_logps"] = old
    batch["old_logps"] = (old * mask).sum(1)
    batch["ref_per_token_logps"] = logprobs + padded(rollouts["reference_difference"], 0.0)

    def loss(rows: slice) -> tuple[float, float]:
        part = {key: value[rows] for key, value in batch.items()}
        return golden_trl.loss_and_gradient(trainer, part | {"num_items_in_batch": part["completion_mask"].sum()})

    each = [loss(slice(s, s + 1))[0] for s in range(len(mask))]
    of_all, gradient = loss(slice(None))
    case = {"name": name, "trainer": f"{kind}Trainer", "options": options}
    return case | {"each": each, "all": of_all, "gradient": gradient}


def main() -> None:
    """Run all trainers and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROLLOUTS_PATH)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rollouts = golden_rollouts()
    logprobs = logprobs_of(trainer_of("GRPO", {}, rollouts["scores"], rollouts["group"]), batch_of(rollouts))
    lengths = [len(ids) for ids in rollouts["response_ids"]]
    overlong = get_soft_overlong_punishment(*OVERLONG)(rollouts["response_ids"])
    content = {
        "versions": {library.__name__: library.__version__ for library in (trl, torch, transformers)},
        "model": CONFIG,
        "seeds": SEEDS,
        "rollouts": rollouts,
        "logprobs": [row[:length].tolist() for row, length in zip(logprobs, lengths, strict=True)],
        "advantages": [advantages_of(*case, rollouts) for case in ADVANTAGES],
        "losses": [losses_of(*case, rollouts) for case in LOSSES],
        "overlong": {"max_length": OVERLONG[0], "cache": OVERLONG[1], "penalties": overlong},
    }
    golden_trl.write(args.out, content)


if __name__ == "__main__":
    main()
