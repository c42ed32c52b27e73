"""The initial policy, the reference's log-probabilities and the check before the first step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.data.example import collate_packed
from sheeprlhf.engine.step import LossOutput, MicroBatch
from sheeprlhf.model.folder.file_parameters import weights_digest
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import AutoModelConfig, LORAConfig, ModelConfig
from sheeprlhf.task.finish import check_reference
from sheeprlhf.task.reference import reference_key, reference_logprobs, sum_by_response
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.lightning import Fabric
from tests.support.batches import random_examples
from tests.support.models import ModelFolder


class Rows:
    """What `reference_logprobs` reads of a prepared dataset and of its batches: five rows of two or three responses."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.splits = folder, {"train": self}
        rows = random_examples(5, 3)
        self.rows = [row if i % 2 else row._replace(responses=row.responses[:2]) for i, row in enumerate(rows)]
        lengths = [[len(row.prompt_ids), *(len(r) for r in row.responses)] for row in self.rows]
        self.sizes = np.array([row + [-1] * (4 - len(row)) for row in lengths])
        self.computed = 0

    def __len__(self) -> int:
        return len(self.rows)

    def numbered(self, rows: Any, read: np.ndarray, label: str) -> Any:
        for part in ([3, 0], [4], [1, 2]):
            if not set(part) <= set(read):
                continue
            self.computed += 1
            batch = collate_packed([self.rows[i] for i in part])
            yield part, MicroBatch(batch, len(part), batch.row_ids)


def policy_of(folder: Path, **options: Any) -> Policy:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), **options)
    return load_policy(cfg, load_tokenizer(cfg), longest=64, batching="packed")


def fabric() -> Fabric:
    made = Fabric(accelerator="cpu", devices=1)
    made.launch()
    return made


def test_reference_of_ragged_rows_is_by_row_and_read_the_second_time(tmp_path: Path, model_folder: ModelFolder) -> None:
    policy, rows = policy_of(model_folder()).train(), Rows(tmp_path)
    arguments: Any = (fabric(), policy, rows, rows, "train", "k" * 64, np.arange(5))
    found = reference_logprobs(*arguments)
    assert policy.training and rows.computed == 3
    for row, example in enumerate(rows.rows):
        with torch.no_grad():
            batch = collate_packed([example])
            alone = sum_by_response(policy(batch).target_N, batch.response_index_N, len(example.responses))
        assert_close(torch.tensor(found[row, : len(alone)]), alone, rtol=0, atol=1e-5)
        assert (found[row, len(alone) :] == 0).all()
    again = reference_logprobs(*arguments)
    assert rows.computed == 3 and np.array_equal(again, found)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("reference-train-")
    whole = path.read_bytes()
    for damaged in (whole[:-4], b"", b"x" * 40, save({"logprobs": found[:4]}), save({"logprobs": found * np.nan})):
        path.write_bytes(damaged)
        assert np.array_equal(reference_logprobs(*arguments), found)
        assert path.read_bytes() == whole


def test_true_half_precision_does_not_round_log_probabilities(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Fabric's wrapper would: then every log-probability of a token would be a number of bfloat16."""
    policy = policy_of(model_folder())
    half = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    half.launch()
    module = half.setup_module(policy)
    rows = Rows(tmp_path)
    found = reference_logprobs(half, module, rows, rows, "train", "k", np.arange(5))  # type: ignore[arg-type]
    batch = collate_packed([rows.rows[0]])
    with torch.no_grad():
        alone = sum_by_response(policy(batch).target_N, batch.response_index_N, 2)
    assert_close(torch.tensor(found[0, :2]), alone, rtol=0, atol=1e-5)


def test_rows_that_are_not_read_are_not_computed(tmp_path: Path, model_folder: ModelFolder) -> None:
    policy, rows = policy_of(model_folder()), Rows(tmp_path)
    arguments: Any = (fabric(), policy, rows, rows, "train", "k" * 64)
    whole = reference_logprobs(*arguments, np.arange(5))
    some = reference_logprobs(*arguments, np.array([0, 3, 4]))
    assert rows.computed == 3 + 2
    assert np.array_equal(some[[0, 3, 4]], whole[[0, 3, 4]])
    assert np.isnan(some[[1, 2]]).all()  # whoever reads them notices
    reference_logprobs(*arguments, np.array([0, 3, 4]))
    assert rows.computed == 3 + 2
    reference_logprobs(*arguments, np.array([1, 2]))  # other rows are another file
    assert rows.computed == 3 + 2 + 1


def test_each_part_of_the_key_tells_references_apart(tmp_path: Path, model_folder: ModelFolder) -> None:
    policy, rows = policy_of(model_folder()), Rows(tmp_path)
    for key in (f"{'a' * 64}-32-true-True", f"{'a' * 64}-bf16-mixed-True", f"{'a' * 64}-32-true-False", "b" * 64):
        reference_logprobs(fabric(), policy, rows, rows, "train", key, np.arange(5))  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 4


def test_dropout_is_off_and_random_numbers_are_untouched(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = model_folder()
    noisy = policy_of(folder, finetune_mode="LORA", lora_cfg=LORAConfig(rank=4, dropout=0.5)).train()
    with torch.no_grad():
        for name, parameter in noisy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rows: list[Any] = [Rows(tmp_path / name) for name in "ab"]
    for one in rows:
        one.folder.mkdir()
    first, second = (reference_logprobs(fabric(), noisy, one, one, "train", "k" * 64, np.arange(5)) for one in rows)
    assert np.array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    batch = collate_packed([rows[0].rows[4]])
    with torch.no_grad():
        quiet = sum_by_response(noisy.eval()(batch).target_N, batch.response_index_N, 2)
    assert_close(torch.tensor(first[4, :2]), quiet, rtol=0, atol=1e-5)


def test_digest_tells_weights_names_and_types_apart() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_digest(module)

    one = torch.ones(4)
    different = [digest(a=one), digest(b=one), digest(a=one * 2), digest(a=one.bfloat16()), digest(a=one.view(2, 2))]
    different += [digest(a=torch.tensor(1.0)), digest(a=torch.tensor(2.0))]
    assert len(set(different)) == len(different)
    assert digest(a=one) == digest(a=one.clone())


@pytest.mark.parametrize("loss_apart", [0.0, 0.01])
@pytest.mark.parametrize("nats", [0.0, 0.01])
@pytest.mark.parametrize("mode", ["error", "warn"])
def test_the_check_finds_what_is_apart(mode: str, nats: float, loss_apart: float, model_folder: ModelFolder) -> None:
    policy, said = policy_of(model_folder()), list[str]()
    batch = collate_packed(random_examples(3, 2))
    with torch.no_grad():
        reference_S = sum_by_response(policy(batch).target_N, batch.response_index_N, 6)
    micro = MicroBatch((batch, reference_S + nats * torch.tensor(batch.response_lengths)), 3, batch.row_ids)

    def loss_fn(module: nn.Module, content: Any) -> LossOutput:
        return LossOutput(torch.tensor(3 * (0.7 + loss_apart)), {})

    arguments: Any = (fabric(), policy, [micro], loss_fn, lambda batch: 3 * 0.7, mode, "32-true", said.append)
    reason = "log-probabilities are 0.01 nats" if nats else "the loss is 0.01 from 0.7000" if loss_apart else ""
    if mode == "error" and reason:
        with pytest.raises(ModelError, match=reason):
            check_reference(*arguments)
    else:
        check_reference(*arguments)
        assert [reason in line for line in said] == ([True] if reason else [])


def test_the_key_tells_architectures_and_adapters_apart(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Equal weights compute other log-probabilities with another window, and with an adapter beside them."""
    folder = model_folder("mistral")
    cfg: Any = SimpleNamespace(
        model=AutoModelConfig(repo_name=str(folder)), fabric=SimpleNamespace(precision="32-true", strategy="auto")
    )

    def key(**options: Any) -> str:
        policy = load_policy(cfg.model, load_tokenizer(cfg.model), longest=64, batching="auto")
        for name, value in options.items():
            setattr(policy.causal_lm().config, name, value)
        return reference_key(policy, cfg)

    keys = [key(), key(sliding_window=8)]
    assert key() == keys[0]
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder)
        get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules=["q_proj"])).save_pretrained(
            tmp_path / str(seed)
        )
        cfg.model = AutoModelConfig(repo_name=str(folder), adapter=str(tmp_path / str(seed)), finetune_mode="LORA")
        keys.append(key())
    assert len(set(keys)) == 4
