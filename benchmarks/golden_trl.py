"""What TRL's own trainers compute on fixed token ids and weights: writes `tests/golden/trl_losses.json`.

    PEER/python benchmarks/golden_trl.py [--out FILE]

PEER is an environment with TRL; nothing of ours runs here but the recipe of the small models and of the pairs in
`tests/support/golden.py`. Each trainer is built on such a model and its `compute_loss` is called on a batch of its own
collator: once with all pairs, and once with each pair alone, which gives the loss of every pair.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.support.golden import CONFIG, PATH, SEEDS, golden_model, golden_pairs
from tests.support.models import EOS, PAD, VOCAB

Pair = dict[str, Any]

# name, options of the trainer
DPO_CASES: list[tuple[str, dict[str, Any]]] = [
    ("sigmoid", {"loss_type": "sigmoid", "beta": 0.1}),
    ("sigmoid, beta 0.5", {"loss_type": "sigmoid", "beta": 0.5}),
    ("sigmoid, label smoothing ignored", {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.2}),
    # TRL has Mitchell's conservative loss only here; on a single pair its sorting does nothing
    ("aot, label smoothing", {"loss_type": "aot", "beta": 0.1, "label_smoothing": 0.2}),
    ("hinge", {"loss_type": "hinge", "beta": 0.1}),
    ("ipo", {"loss_type": "ipo", "beta": 0.1}),
    ("robust", {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.2}),
    ("apo_zero", {"loss_type": "apo_zero", "beta": 0.1}),
    ("sigmoid_norm", {"loss_type": "sigmoid_norm", "beta": 0.5}),
    ("exo", {"loss_type": "exo_pair", "beta": 0.1, "label_smoothing": 0.2}),
    ("nca", {"loss_type": "nca_pair", "beta": 0.1}),
    ("sppo", {"loss_type": "sppo_hard", "beta": 0.1}),
    ("discopop", {"loss_type": "discopop", "beta": 0.1}),
    ("apo_down", {"loss_type": "apo_down", "beta": 0.1}),
    ("bco", {"loss_type": "bco_pair", "beta": 0.1}),  # without the shift, which is 0 in the first step
    ("aot", {"loss_type": "aot", "beta": 0.1}),
    ("aot_unpaired", {"loss_type": "aot_unpaired", "beta": 0.1, "label_smoothing": 0.2}),
    ("length desensitisation", {"loss_type": "sigmoid", "beta": 0.1, "ld_alpha": 0.5}),
    ("weighting", {"loss_type": "sigmoid", "beta": 0.1, "use_weighting": True}),
    *(
        (f"sigmoid, {name}", {"loss_type": "sigmoid", "beta": 0.1, "f_divergence_type": name})
        for name in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
]
CPO_CASES: list[tuple[str, dict[str, Any]]] = [
    ("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    ("cpo sigmoid", {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.0}),
    ("cpo sigmoid, label smoothing", {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.2, "cpo_alpha": 0.0}),
    ("cpo hinge", {"loss_type": "hinge", "beta": 0.1, "cpo_alpha": 0.0}),
    ("cpo", {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}),
]
ORPO_CASES: list[tuple[str, dict[str, Any]]] = [("orpo", {"beta": 0.25})]
KTO_CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("kto", "policy", "reference", {"beta": 0.1}),
    ("kto, the other way round", "reference", "policy", {"beta": 0.1}),  # the mean log-ratio of one of them is below 0
    ("kto, weights", "policy", "reference", {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}),
    ("kto, weights, the other way round", "reference", "policy", {"beta": 0.3, "desirable_weight": 1.2}),
]
RM_CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("last_token", {}, False),
    ("last_token, margin", {}, True),
    ("last_token, centered", {"center_rewards_coefficient": 0.05}, False),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ...: the trainers want one."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"w{PAD}", eos_token=f"w{EOS}")


def settings(config: Any, options: dict[str, Any]) -> Any:
    """Arguments of a trainer: on the CPU, float32, nothing checkpointed or cut."""
    return config(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        **({"max_length": None} if "max_length" in config.__dataclass_fields__ else {}),
        **options,
    )


def unused_rows(**columns: str | bool) -> Dataset:
    """Two rows of text, which the trainers prepare and we do not use."""
    return Dataset.from_list([columns] * 2)


def loss_and_gradient(trainer: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """The trainer's loss, and the norm of all gradients."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    norms = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.stack(norms).norm().item()


def measured(trainer: Any, rows: list[Any]) -> dict[str, Any]:
    """Losses of each row alone and of all together, and the gradient's norm of all together."""
    each = [loss_and_gradient(trainer, trainer.data_collator([row]))[0] for row in rows]
    loss, gradient = loss_and_gradient(trainer, trainer.data_collator(rows))
    return {"each": each, "all": loss, "gradient": gradient}


def dpo(pairs: list[Pair]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """DPOTrainer's losses, and the log-probabilities that it sums."""
    rows, found, sums = [{k: pair[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs], [], {}
    for name, options in DPO_CASES:
        trainer = trl.DPOTrainer(
            model=golden_model("policy"),
            ref_model=golden_model("reference"),
            args=settings(trl.DPOConfig, options),
            train_dataset=unused_rows(prompt="w3 w4", chosen=" w5", rejected=" w6"),
            processing_class=tokenizer(),
        )
        found.append({"name": name, "trainer": "DPOTrainer", "options": options} | measured(trainer, rows))
        inputs = trainer.data_collator(rows)
        for which, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
            chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
            sums[which] = torch.stack([chosen, rejected], 1).tolist()
    return found, sums


def without_reference(pairs: list[Pair]) -> list[dict[str, Any]]:
    """CPOTrainer's and ORPOTrainer's losses; of ORPO the two parts too, as its NLL covers the prompt."""
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + response
            row[f"{side}_attention_mask"] = [1] * len(prompt + response)
            row[f"{side}_labels"] = [-100] * len(prompt) + response
        rows.append(row)
    found = []
    for config, kind, cases in ((CPOConfig, CPOTrainer, CPO_CASES), (ORPOConfig, ORPOTrainer, ORPO_CASES)):
        for name, options in cases:
            trainer = kind(
                model=golden_model("policy"),
                args=settings(config, options),
                train_dataset=unused_rows(prompt="w3 w4", chosen=" w5", rejected=" w6"),
                processing_class=tokenizer(),
            )
            case = {"name": name, "trainer": kind.__name__, "options": options} | measured(trainer, rows)
            if kind is ORPOTrainer:
                with torch.no_grad():
                    parts = [
                        trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator([row]))[1] for row in rows
                    ]
                case["nll_with_prompt"] = [part["nll_loss"] for part in parts]
                case["log_sigmoid_of_odds_ratio"] = [part["log_odds_ratio"] for part in parts]
            found.append(case)
    return found


def kto(pairs: list[Pair]) -> list[dict[str, Any]]:
    """KTOTrainer's losses of both responses of the pairs, one batch; each with the next one's prompt for the KL."""
    rows = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{side}_ids"], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    others = [rows[-1], *rows[:-1]]
    rows = [row | {"KL_completion_ids": other["completion_ids"]} for row, other in zip(rows, others, strict=True)]
    found = []
    for name, model, reference, options in KTO_CASES:
        trainer = trl.KTOTrainer(
            model=golden_model(model),
            ref_model=golden_model(reference),
            args=settings(trl.KTOConfig, options | {"per_device_train_batch_size": 2}),
            train_dataset=unused_rows(prompt="w3 w4", completion=" w5", label=True),
            processing_class=tokenizer(),
        )
        inputs = trainer.data_collator(rows)
        loss, gradient = loss_and_gradient(trainer, inputs)
        kl = trainer._metrics["train" if trainer.model.training else "eval"]["kl"][-1]
        with torch.no_grad():
            mismatched = trainer._compute_kl_logps(trainer.model, inputs)
            mismatched = mismatched - trainer._compute_kl_logps(trainer.ref_model, inputs)
        case = {"name": name, "trainer": "KTOTrainer", "model": model, "reference": reference, "options": options}
        found.append(case | {"mismatched_log_ratios": mismatched.tolist(), "kl": kl, "all": loss, "gradient": gradient})
    return found


def reward(pairs: list[Pair]) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """RewardTrainer's losses, and the scores that they come from."""
    found = []
    for name, options, margin in RM_CASES:
        trainer = trl.RewardTrainer(
            model=golden_model("reward"),
            args=settings(trl.RewardConfig, options),
            train_dataset=unused_rows(prompt="w3 w4", chosen=" w5", rejected=" w6"),
            processing_class=tokenizer(),
        )
        rows = [
            {f"{side}_ids": pair["prompt_ids"] + pair[f"{side}_ids"] for side in ("chosen", "rejected")}
            | ({"margin": pair["margin"]} if margin else {})
            for pair in pairs
        ]
        case = {"name": name, "trainer": "RewardTrainer", "options": options, "margin": margin}
        found.append(case | measured(trainer, rows))
        with torch.no_grad():
            inputs = trainer.data_collator(rows)
            inputs.pop("margin", None)
            scores = trainer.model(**inputs).logits.squeeze(-1).view(2, -1).T.tolist()
    return found, scores


def rounded(value: Any) -> Any:
    """Nine significant digits: all that float32 has."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Run all trainers and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = golden_pairs()
    with_reference, sums = dpo(pairs)
    reward_cases, scores = reward(pairs)
    content = {
        "versions": {library.__name__: library.__version__ for library in (trl, torch, transformers)},
        "model": CONFIG,
        "seeds": SEEDS,
        "pairs": pairs,
        "sums": sums,
        "scores": scores,
        "preference": with_reference + without_reference(pairs),
        "kto": kto(pairs),
        "reward": reward_cases,
    }
    write(args.out, content)


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, with each element of a list in a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f'  "{key}": {_rows(value)}' for key, value in rounded(content).items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path}: {path.stat().st_size} bytes, TRL {trl.__version__}")


def _rows(value: Any) -> str:
    """JSON, with each element of a list in a line of its own."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
    return json.dumps(value)


if __name__ == "__main__":
    main()
