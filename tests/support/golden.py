"""The small models behind `tests/golden/`, alike wherever they are built: drawn with NumPy's frozen generator."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from tests.support.models import BOS, EOS, PAD, VOCAB, byte_tokenizer

PATH = Path(__file__).parents[1] / "golden" / "trl_losses.json"
ROLLOUTS_PATH = PATH.with_name("trl_rollouts.json")
CONFIG = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=BOS,
)
SEEDS = {"policy": 1, "reference": 2, "reward": 3}


def golden_model(name: str) -> PreTrainedModel:
    """One of SEEDS, float32; parameters are drawn in the order of their names, N(0, 0.4), norms around 1."""
    config = LlamaConfig(**CONFIG, num_labels=1)
    model = (LlamaForSequenceClassification if name == "reward" else LlamaForCausalLM)(config).eval()
    rng = np.random.RandomState(SEEDS[name])
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            drawn = torch.from_numpy(0.4 * rng.standard_normal(tuple(parameter.shape))).float()
            parameter.copy_(1.0 + drawn if "norm" in key else drawn)
    return model


def golden_folder(name: str, folder: Path) -> Path:
    """The model and a tokenizer, in the hub's folder layout."""
    golden_model(name).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def golden_pairs() -> list[dict[str, Any]]:
    """Prompts of 1 to 9 tokens with two responses; the last pair's rejected one is how its chosen one begins."""
    rng = np.random.RandomState(0)

    def ids(low: int, high: int) -> list[int]:
        return rng.randint(0, 250, rng.randint(low, high)).tolist()

    margins = [0.0, 1.0 / 3.0, 0.5, 1.0, 2.0, 3.0]
    pairs = [
        {"prompt_ids": ids(1, 10), "chosen_ids": [*ids(0, 8), EOS], "rejected_ids": [*ids(0, 8), EOS], "margin": margin}
        for margin in margins
    ]
    pairs[-1]["rejected_ids"] = pairs[-1]["chosen_ids"][:-1] or ids(2, 4)
    return pairs


def golden_rollouts() -> dict[str, Any]:
    """Three prompts with the responses of two pairs to each, scores, and log-probabilities relative to the policy's.

    The scores of the last group are equal. The old policy and the reference differ from the policy by what is stored:
    log policy - log old, and log reference - log policy, of each token.
    """
    pairs, rng = golden_pairs(), np.random.RandomState(4)
    group, prompts, responses = 4, [], []
    for first, second in ((0, 3), (1, 4), (2, 5)):
        prompts += [pairs[first]["prompt_ids"]] * group
        responses += [pairs[p][f"{side}_ids"] for p in (first, second) for side in ("chosen", "rejected")]
    scores = [*rng.standard_normal(2 * group).round(3).tolist(), *[0.5] * group]
    return {
        "group": group,
        "prompt_ids": prompts,
        "response_ids": responses,
        "scores": scores,
        "advantages": rng.standard_normal(len(responses)).round(3).tolist(),
        "old_difference": [(0.2 * rng.standard_normal(len(ids))).round(3).tolist() for ids in responses],
        "reference_difference": [(0.5 * rng.standard_normal(len(ids))).round(3).tolist() for ids in responses],
    }


def load_golden(path: Path = PATH) -> dict[str, Any]:
    """What `benchmarks/golden_trl.py` or `golden_trl_rollouts.py` wrote."""
    return json.loads(path.read_text())
