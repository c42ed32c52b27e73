"""One KTO step against a brute force of plain transformers forwards; its cut, its labels' means, its weights."""

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sheeprlhf.agent.batches import Batches, longest_row
from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.data.prepare import PreparedData
from sheeprlhf.data.store import MismatchedSplit
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.step import evaluate, update
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.structure.task import KTOConfig
from sheeprlhf.task.reference import reference_logprobs, reference_logprobs_of
from sheeprlhf.task.train.kto import by_label, estimate_kl, kto_loss, weights_warning
from sheeprlhf.utils.errors import DataError
from tests.support.models import ModelFolder
from tests.unit.data.toy import local, prepare

ROWS = [
    {"prompt": "who?", "response": " a wizard", "label": True},
    {"prompt": "what is brewing in the old pot?", "response": " a potion", "label": False},
    {"prompt": "where?", "response": " over there, behind the seven hills", "label": True},
    {"prompt": "why is it so?", "response": " no", "label": False},
    {"prompt": "when?", "response": " at noon", "label": True},
    {"prompt": "how many dogs jumped?", "response": " one lazy dog and a fox", "label": False},
    {"prompt": "a?", "response": " b", "label": True},
]
STEP = np.array([4, 0, 6, 3, 5])  # not in order, and rows 4, 0 and 3 borrow from rows that are not in it
TASK = {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.8}


class Models(NamedTuple):
    """A policy that has moved from its reference."""

    folder: Path
    policy: PreTrainedModel
    reference: PreTrainedModel


def moved(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model and its original."""
    one, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return one, other


@pytest.fixture(params=["policy moved", "reference moved"])
def models(request: pytest.FixtureRequest, model_folder: ModelFolder) -> Models:
    """Swapping the two turns the sign of the KL's estimate, which is cut at 0 in one of the cases."""
    folder = model_folder()
    one, other = moved(folder)
    return Models(folder, *((one, other) if request.param == "policy moved" else (other, one)))


@pytest.fixture
def data(tmp_path: Path, model_folder: ModelFolder) -> PreparedData:
    return prepare(local(tmp_path, ROWS), AutoTokenizer.from_pretrained(model_folder()), "unpaired")


def padded_logprobs(model: PreTrainedModel, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
    """The definition: sums of the log-probabilities of responses behind their prompts, in one padded batch."""
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(pairs):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[row, : len(prompt) + len(response)] = 1
    logprobs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    sums = []
    for row, (prompt, response) in enumerate(pairs):
        sums.append(sum(logprobs[row, len(prompt) + i - 1, token] for i, token in enumerate(response)))
    return torch.stack(sums)


def by_brute_force(models: Models) -> dict[str, Any]:
    """Loss, KL, rewards and gradients of the step, from the text of the rows and the paper's equations."""
    tokenizer = AutoTokenizer.from_pretrained(models.folder)

    def ids(row: int, text: str) -> list[int]:
        start = [tokenizer.bos_token_id] if text == "prompt" else []
        end = [tokenizer.eos_token_id] if text == "response" else []
        return [*start, *tokenizer(ROWS[row][text], add_special_tokens=False)["input_ids"], *end]

    own = [(ids(i, "prompt"), ids(i, "response")) for i in STEP.tolist()]
    mismatched = [(ids(i, "prompt"), ids((i + 1) % len(ROWS), "response")) for i in STEP.tolist()]
    with torch.no_grad():
        apart = padded_logprobs(models.policy, mismatched) - padded_logprobs(models.reference, mismatched)
        reference = padded_logprobs(models.reference, own)
    kl = max(0.0, float(apart.mean()))
    models.policy.zero_grad()
    logps = padded_logprobs(models.policy, own)
    total = torch.zeros(())
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for i, logp, ref in zip(STEP.tolist(), logps, reference, strict=True):
        label = bool(ROWS[i]["label"])
        margin = TASK["beta"] * ((logp - ref) - kl)
        if label:
            total = total + TASK["desirable_weight"] * (1 - torch.sigmoid(margin))
        else:
            total = total + TASK["undesirable_weight"] * (1 - torch.sigmoid(-margin))
        rewards[label].append(TASK["beta"] * float((logp - ref).detach()))
    loss = total / len(STEP)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in models.policy.named_parameters() if p.grad is not None}
    models.policy.zero_grad()
    means = {label: sum(values) / len(values) for label, values in rewards.items()}
    return {"loss": loss.item(), "kl": kl, "apart": float(apart.mean()), "rewards": means, "gradients": gradients}


class Ours(NamedTuple):
    """The step, and the validation of the same rows before it, as the task computes them."""

    metrics: dict[str, float]
    validated: dict[str, float]
    gradients: dict[str, Tensor]


def as_policy(folder: Path, model: PreTrainedModel) -> Policy:
    """A model of the task's own with these weights."""
    cfg = AutoModelConfig(repo_name=str(folder))
    policy = load_policy(cfg, AutoTokenizer.from_pretrained(folder), longest=60, batching="auto")
    assert policy.packed
    policy.causal_lm().load_state_dict(model.state_dict())
    return policy


def by_the_task(models: Models, data: PreparedData, *, packed: bool, **options: Any) -> Ours:
    fabric: Fabric = make_fabric(FabricConfig())
    task = KTOConfig(**TASK, **({"mini_batch_size": 5} | options))
    rows, others = data.splits["train"], MismatchedSplit(data.folder / "train.arrow", longest_row(data.splits))
    splits = {"train": rows, "train-mismatched": others}
    cut = partial(Batches, fabric, task, packed=packed, targets="response")
    reference = fabric.setup(as_policy(models.folder, models.reference))
    batches = {}
    for name in splits:
        everything = np.arange(len(splits[name]))
        of_split = (data._replace(splits=splits), name, f"{id(models)}", everything)
        sums = reference_logprobs(fabric, reference, cut(), *of_split)
        batches[name] = cut(num_items=lambda batch: len(batch.row_ids), extras=partial(reference_logprobs_of, sums))
    policy = as_policy(models.folder, models.policy)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    module, optimizer = fabric.setup(policy, torch.optim.SGD(policy.parameters(), lr=1.0))
    kl = estimate_kl(fabric, module, batches["train-mismatched"].of(others, STEP))
    loss_fn = partial(kto_loss, task=task, kl=kl)
    validated = evaluate(fabric, module, batches["train"].of(rows, STEP), loss_fn)
    metrics = update(fabric, module, optimizer, batches["train"].of(rows, STEP), loss_fn, max_grad_norm=None)
    gradients = {name: before[name] - p.detach() for name, p in policy.model.named_parameters()}
    return Ours(by_label(metrics) | {"kl": kl}, by_label(validated) | {"kl": kl}, gradients)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_step_is_the_papers(packed: bool, models: Models, data: PreparedData) -> None:
    expected = by_brute_force(models)
    ours = by_the_task(models, data, packed=packed, micro_batch_size=2)
    assert abs(expected["apart"]) > 0.05  # the estimate matters, or is cut
    assert (expected["kl"] > 0) == (expected["apart"] > 0)
    for metrics in (ours.metrics, ours.validated):
        assert metrics["kl"] == pytest.approx(expected["kl"], abs=1e-5)
        assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert metrics["rewards/chosen"] == pytest.approx(expected["rewards"][True], abs=1e-5)
        assert metrics["rewards/rejected"] == pytest.approx(expected["rewards"][False], abs=1e-5)
        assert metrics["share/chosen"] == 3 / 5
    for name, gradient in expected["gradients"].items():
        assert_close(ours.gradients[name], gradient, rtol=0, atol=1e-5)


def test_the_two_cases_have_a_kl_of_either_sign(model_folder: ModelFolder, data: PreparedData) -> None:
    """Else the test above would not see what is done with a negative estimate."""
    one, other = moved(model_folder())
    signs = [by_brute_force(Models(model_folder(), *pair))["apart"] > 0 for pair in ((one, other), (other, one))]
    assert sorted(signs) == [False, True]


@pytest.mark.parametrize("options", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"token_budget": 40}], ids=str)
def test_the_cut_changes_nothing(options: dict[str, int], models: Models, data: PreparedData) -> None:
    whole = by_the_task(models, data, packed=True, micro_batch_size=5)
    ours = by_the_task(models, data, packed=True, **options)
    assert ours.metrics == pytest.approx(whole.metrics, abs=1e-6, rel=1e-6)
    assert_close(ours.gradients, whole.gradients, rtol=0, atol=1e-5)


def test_means_are_over_the_examples_of_a_label() -> None:
    """Of 10 examples 2 are desirable, with rewards that add up to 3; those of the other 8 add up to -4."""
    means = {"loss": 0.5, "items": 10.0, "share/chosen": 0.2, "share/rejected": 0.8}
    means |= {"rewards/chosen": 0.3, "rewards/rejected": -0.4, "logps/chosen": -2.0, "logps/rejected": -16.0}
    assert by_label(means) == pytest.approx(
        {
            "loss": 0.5,
            "items": 10.0,
            "share/chosen": 0.2,
            "rewards/chosen": 1.5,
            "rewards/rejected": -0.5,
            "rewards/margins": 2.0,
            "logps/chosen": -10.0,
            "logps/rejected": -20.0,
        }
    )
    alone = means | {"share/chosen": 0.0, "share/rejected": 1.0, "rewards/chosen": 0.0, "logps/chosen": 0.0}
    assert set(by_label(alone)) == {"loss", "items", "share/chosen", "rewards/rejected", "logps/rejected"}


@pytest.mark.parametrize(
    ("desirable", "undesirable", "weights", "advice"),
    [
        (100, 100, (1.0, 1.0), None),
        (130, 100, (1.0, 1.0), None),
        (100, 200, (2.0, 1.0), None),
        (100, 200, (1.0, 1.0), "desirable_weight=2.33"),  # 7/6 * 200/100
        (200, 100, (1.0, 1.0), "undesirable_weight=1.71"),  # 6/7 * 200/100
        (100, 100, (1.0, 3.0), "desirable_weight=3.5"),
        (100, 100, (1.0, 0.5), "undesirable_weight=0.857"),
    ],
)
def test_weights_that_let_one_label_rule(
    desirable: int, undesirable: int, weights: tuple[float, float], advice: str | None
) -> None:
    names = ("desirable_weight", "undesirable_weight")
    warning = weights_warning(desirable, undesirable, KTOConfig(**dict(zip(names, weights, strict=True))))
    if advice is None:
        assert warning is None
        return
    assert warning is not None and warning.endswith(f"give task.{advice}")
    name, value = advice.split("=")
    mended = KTOConfig(**dict(zip(names, weights, strict=True)) | {name: float(value)})
    assert weights_warning(desirable, undesirable, mended) is None


@pytest.mark.parametrize(("counts", "says"), [((3, 0), "desirable, .* label false"), ((0, 3), "label true")])
def test_both_labels_are_needed(counts: tuple[int, int], says: str) -> None:
    with pytest.raises(DataError, match=says):
        weights_warning(*counts, KTOConfig())


def test_at_no_distance_the_loss_is_half_the_weight(models: Models, data: PreparedData) -> None:
    same = models._replace(reference=models.policy)
    metrics = by_the_task(same, data, packed=True).metrics
    expected = (3 * TASK["desirable_weight"] + 2 * TASK["undesirable_weight"]) / 5 / 2
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
    assert math.isclose(metrics["kl"], 0.0, abs_tol=1e-5)
