"""The memory plan: exact where tensors can be counted, and close to what a process really takes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import reward_model_of
from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.engine.optim import build_optimizer
from sheeprlhf.model.adapter import add_lora
from sheeprlhf.model.attention import most_kept_keys, placeholder_mask
from sheeprlhf.model.folder.architecture import decoder_blocks
from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.model.lm_head import MAX_LOGITS, backbone_and_head
from sheeprlhf.model.memory import (
    LIBRARIES,
    NO_HOLES,
    ModelSize,
    allocator_share,
    freeze_layers,
    measure,
    optimizer_bytes,
    plan,
)
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.structure.run import AdamConfig, AdamWConfig, OptimizerConfig, SGDConfig
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.processes import reliable_sigint
from tests.support.batches import random_examples
from tests.support.models import ARCHITECTURES, ModelFolder
from tests.support.runs import train_words

ROOT = Path(__file__).parents[3]


def config_of(folder: Path, mode: str, **options: Any) -> ModelConfig:
    lora = LORAConfig(rank=4)
    return ModelConfig(config_name="auto", repo_name=str(folder), finetune_mode=mode, lora_cfg=lora, **options)


def real_policy(cfg: ModelConfig) -> Policy:
    model = load_causal_lm(cfg, vocabulary=0, longest=0)
    return Policy(add_lora(model, cfg.lora_cfg) if cfg.finetune_mode == "LORA" and cfg.lora_cfg else model)


def test_ctrl_c_waits_for_the_end_of_the_plan(model_folder: ModelFolder) -> None:
    """Raised between two operations on tensors without content, it leaves torch in a state that ends the process."""
    seen = []

    def interrupt(module: nn.Module, *_: object) -> None:
        if isinstance(module, LlamaDecoderLayer):
            seen.append("layer")
            signal.raise_signal(signal.SIGINT)
        elif isinstance(module, LlamaModel):
            seen.append("end")

    hook = nn.modules.module.register_module_forward_hook(interrupt)
    try:
        with reliable_sigint(), pytest.raises(KeyboardInterrupt):
            measure(config_of(model_folder("llama"), "ALL"), "32-true")
    finally:
        hook.remove()
    assert seen == ["layer", "layer", "end"]


@pytest.mark.parametrize(
    ("architecture", "mode"), [*((name, "ALL") for name in ARCHITECTURES), ("llama", "LORA"), ("gpt2", "LORA")]
)
def test_weights_gradients_and_optimizer_are_exact(architecture: str, mode: str, model_folder: ModelFolder) -> None:
    cfg = config_of(model_folder(architecture), mode)
    size, policy = measure(cfg, "32-true"), real_policy(cfg)
    optimizers: list[OptimizerConfig] = [AdamWConfig(), AdamConfig(), SGDConfig(momentum=0.9), SGDConfig()]
    for optim in optimizers:
        optimizer = build_optimizer(optim, (policy.parameters(), 1e-3))
        if architecture == "falcon":
            policy.causal_lm()(input_ids=torch.arange(9)[None]).logits.sum().backward()
        else:
            policy(collate_packed(random_examples(2))).target_N.sum().backward()
        gradients = [p.grad.nbytes for p in policy.parameters() if p.grad is not None]
        optimizer.step()
        values = [value for state in optimizer.state.values() for value in state.values()]
        state = [value.nbytes for value in values if isinstance(value, Tensor)]
        assert optimizer_bytes(optim, size) == sum(state)
        assert size.trainable == sum(gradients)
        optimizer.zero_grad()
    tensors = [*policy.parameters(), *policy.buffers()]
    assert size.weights == sum(tensor.nbytes for tensor in tensors)
    assert size.parameters == sum(parameter.numel() for parameter in policy.parameters())


@pytest.mark.parametrize("trains", ["ALL", "LORA", "only the head"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_reward_model_is_measured_with_its_own_head(
    architecture: str, trains: str, model_folder: ModelFolder
) -> None:
    """It has a score for a head, no logits; a language head that is no input embedding is gone."""
    mode, frozen = ("ALL", True) if trains == "only the head" else (trains, False)
    cfg = config_of(model_folder(architecture), mode, freeze_transformer=frozen)
    size = measure(cfg, "32-true", True)
    tokenizer = load_tokenizer(cfg)
    whole = dataclasses.replace(cfg, finetune_mode="ALL", freeze_transformer=False)
    real = reward_model_of(Policy(load_causal_lm(whole, vocabulary=0, longest=0)), cfg, tokenizer)
    optimizer = build_optimizer(AdamWConfig(), (real.parameters(), 1e-3))
    real(collate_packed(random_examples(2, 2), targets="last")).sum().backward()
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert size.weights == sum(tensor.nbytes for tensor in [*real.parameters(), *real.buffers()])
    assert size.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert size.trainable == sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    assert optimizer_bytes(AdamWConfig(), size) == sum(v.nbytes for v in values if isinstance(v, Tensor))
    assert size.vocabulary == 0
    assert (size.fixed + size.per_token == 0) == frozen  # nothing is kept where nothing trains


@pytest.mark.parametrize(("mode", "precision"), [("ALL", "32-true"), ("LORA", "bf16-mixed")])
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        *((name, [(20, 20), (8, 30)]) for name in ("llama", "gpt2", "opt", "mixtral")),
        *(("phi", sizes) for sizes in ([(100, 156)], [(60, 200), (60, 200)])),  # attention keeps its weights
        ("llama", [(100, 156)]),  # but not where heads share keys
    ],
)
def test_activations_are_what_autograd_keeps(
    architecture: str,
    sizes: list[tuple[int, int]],
    mode: str,
    precision: str,
    model_folder: ModelFolder,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Counted in a forward pass of the real model."""
    cfg = config_of(model_folder(architecture), mode)
    policy = real_policy(cfg)
    text = np.arange(300, dtype=np.int32) % 7
    batch = collate_packed([Example(i, text[:p], (text[:r],)) for i, (p, r) in enumerate(sizes)])
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    backbone, _ = backbone_and_head(policy.causal_lm())
    ids = batch.input_ids_BT
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = backbone(
            input_ids=ids,
            attention_mask=placeholder_mask(ids),
            position_ids=batch.position_ids_BT,
            layout=batch.layout,
            use_cache=False,
        )
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*backbone.parameters(), *backbone.buffers()]}
    real = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    assert result is not None  # what is kept, is kept until here
    capfd.readouterr()
    size = measure(cfg, precision)
    assert "Traceback" not in "".join(capfd.readouterr())  # torch prints one where it knows no shapes
    keys = most_kept_keys(max(map(sum, sizes)))
    assert (size.attention > 0, keys > 0) == (architecture not in ("llama", "mixtral"), sum(sizes[0]) > 192)
    kept_per_token = size.per_token * 2 / 3 + keys * size.attention  # of two layers; the gradients of one come on top
    # With kept weights torch's kernel, of which a plan's activations are, keeps no output.
    assert size.fixed + ids.numel() * kept_per_token == pytest.approx(real, rel=0.03 if keys else 0.02)


def test_dtype_and_true_precision(model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    full, half = measure(config_of(folder, "ALL"), "32-true"), measure(config_of(folder, "ALL"), "bf16-true")
    assert half.trainable * 2 == full.trainable and half.half and not full.half
    stored = measure(config_of(folder, "LORA", dtype="bfloat16"), "32-true")
    adapters = stored.trainable  # float32 beside weights of half the size
    assert stored.weights < full.weights and adapters == measure(config_of(folder, "LORA"), "32-true").trainable
    assert stored.saved == adapters


def test_the_plan_by_hand() -> None:
    size = ModelSize(
        parameters=100,
        weights=400,
        trainable=200,
        trainable_tensors=5,
        saved=400,
        fixed=10,
        per_token=7,
        checkpointed=3,
        vocabulary=50,
        half=False,
        positions=None,
    )
    parts = plan(size, AdamWConfig(), tokens=20, checkpointing=False, allocator_share=0.5)
    activations, logits = 10 + 20 * 7, 20 * 50 * 4
    allocator = (activations + logits) // 2
    assert parts == (400, 200, 2 * 200 + 4 * 5, activations, logits, allocator, LIBRARIES, 0, 0)
    assert parts.total() == 400 + 200 + 420 + activations + logits + allocator + LIBRARIES
    own = size._replace(attention=6, attention_layers=2)
    kept = plan(own, SGDConfig(), tokens=20, checkpointing=True, allocator_share=0.0, keys=5)
    assert kept.activations == 10 + 20 * (3 + 5 * 3)
    few = plan(size._replace(half=True), SGDConfig(), tokens=20, checkpointing=True, allocator_share=0.0)
    assert few[:6] == (400, 200, 0, 10 + 20 * 3, 20 * 50 * 2, 0)
    many = plan(size._replace(vocabulary=MAX_LOGITS), SGDConfig(), tokens=20, checkpointing=True, allocator_share=0.0)
    assert many.logits == MAX_LOGITS * 4


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("task", "mode", "length"),
    [*((task, mode, 128) for task in ("sft", "rm", "dpo") for mode in ("ALL", "LORA")), ("sft", "ALL", 448)],
)
def test_a_real_run_takes_what_was_planned(task: str, mode: str, length: int, tmp_path: Path) -> None:
    """Growth of the peak memory of a process, within 25 %; freed memory is given back at once, which is no guess."""
    rows = tmp_path / "rows.jsonl"
    text = " the value of this list, or none if it is empty" * 80
    both = {"chosen": text, "rejected": " returns a mapping of names and their numbers, else nothing" * 80}
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", **both}) + "\n" for n in range(40)))
    more = ["task.max_num_steps=2", "task.epochs=1", "task.max_eval_batches=1"]
    words = train_words(Path(), rows, tmp_path / "run", *more, task=task)
    words = [word for word in words if not word.startswith(("model", "data.max", "task.mi", "task.num_sample"))]
    words += ["model=tiny", f"model.finetune_mode={mode}", f"data.max_length={length}", "data.max_prompt_length=64"]
    words += ["task.mini_batch_size=32", "task.token_budget=2048"]
    words += [] if task == "rm" else ["task.num_sample_prompts=0"]
    done = subprocess.run(
        [sys.executable, "benchmarks/measure_memory.py", *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", NO_HOLES: "131072"},
    )
    assert json.loads(done.stdout.splitlines()[-1])["ratio"] == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(("threshold", "share"), [(None, 0.8), ("131072", 0.0), ("1073741824", 0.8), ("", 0.8)])
def test_a_heap_without_holes_needs_a_low_threshold(
    threshold: str | None, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NO_HOLES, raising=False)
    if threshold is not None:
        monkeypatch.setenv(NO_HOLES, threshold)
    assert (allocator_share("cpu", "ALL"), allocator_share("cuda", "ALL")) == (share, 0.0)


def test_of_a_model_of_text_and_images_the_text_counts(model_folder: ModelFolder) -> None:
    """Its decoder is that of the model of text alone; the other parts only add weights."""
    both, text = (measure(config_of(model_folder(name), "ALL"), "32-true") for name in ("gemma3", "gemma3_text"))
    names = ("per_token", "checkpointed", "positions", "block")
    assert [getattr(both, name) for name in names] == [getattr(text, name) for name in names]
    assert both.positions == 128 and both.parameters > text.parameters
    model = load_causal_lm(config_of(model_folder("gemma3"), "ALL"), vocabulary=260, longest=128)
    freeze_layers(model, 1)
    [first, second] = decoder_blocks(model)
    assert model.get_decoder().layers[1] is second
    assert not any(weight.requires_grad for weight in first.parameters())
    assert all(weight.requires_grad for weight in second.parameters())
    with pytest.raises(ModelError, match=r"data\.max_length=128"):
        load_causal_lm(config_of(model_folder("gemma3"), "ALL"), vocabulary=260, longest=129)
