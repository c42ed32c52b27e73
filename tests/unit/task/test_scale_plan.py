"""The plan of a step over many ranks: arithmetic by hand, and a dry step whose counted traffic agrees with it."""

from pathlib import Path
from typing import Any

import pytest

from sheeprlhf.model.memory import ModelSize, measure
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import AutoModelConfig, LORAConfig, ModelConfig
from sheeprlhf.structure.reward import FunctionRewardConfig, ModelRewardConfig, NoRewardConfig
from sheeprlhf.structure.rollout import DistillConfig, GRPOConfig, PPOConfig, VLLMRolloutConfig
from sheeprlhf.structure.run import AdamWConfig, ClusterConfig, DoctorConfig, FabricConfig, TrainConfig
from sheeprlhf.structure.task import DPOConfig, RMConfig, SFTConfig, TrainTaskConfig
from sheeprlhf.task.scale_plan import dry_step, passes_of_rank, rows_of_forward, step_plan, step_time, traffic
from tests.support.composed import measure_once
from tests.support.models import ModelFolder

SHAPES = {  # hidden size, inner size, layers, size of keys, vocabulary
    "embedded:llama-7b": (4096, 11008, 32, 4096, 32000),
    "embedded:llama-70b": (8192, 28672, 80, 1024, 128256),
}


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_once(monkeypatch)


def size_by_hand(name: str) -> ModelSize:
    """The parameters of a Llama: four projections, three matrices of the MLP and two norms a layer; two embeddings."""
    hidden, inner, layers, keys, vocabulary = SHAPES[name]
    block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    outside = 2 * vocabulary * hidden + hidden
    number = layers * block + outside
    kept = {"fixed": 0, "per_token": 10**5, "checkpointed": 10**4, "half": True, "positions": 4096}
    return ModelSize(
        number, 4 * number, 4 * number, 9 * layers + 3, 4 * number, vocabulary=vocabulary, **kept,
        trainable_numbers=number, block=block, outside=outside,
    )  # fmt: skip


def config_of(model: ModelConfig, ranks: int, task: TrainTaskConfig | None = None, **options: Any) -> DoctorConfig:
    data = LocalDataConfig(train_file="rows.jsonl", max_length=4096)
    fabric = FabricConfig(**{"strategy": "fsdp2", "devices": "8", "num_nodes": ranks // 8} | options)
    task = task or SFTConfig(mini_batch_size=4 * ranks, token_budget=16384)
    return DoctorConfig(task=task, model=model, data=data, fabric=fabric, optim=AdamWConfig())


def test_the_embedded_shapes_have_the_parameters_of_their_names() -> None:
    size = measure(AutoModelConfig(repo_name="embedded:llama-7b"), "32-true")
    by_hand = size_by_hand("embedded:llama-7b")
    for name in ("parameters", "trainable", "trainable_tensors", "trainable_numbers", "block", "outside", "saved"):
        assert getattr(size, name) == getattr(by_hand, name)


@pytest.mark.parametrize(
    ("model", "ranks", "state", "gather", "reduce", "computation"),
    [  # per GPU: GB of weights, gradients and moments; GB of gathered weights and reduced gradients; seconds
        ("embedded:llama-7b", 8, 13.5, 23.6, 23.6, 2.23),
        ("embedded:llama-7b", 64, 1.7, 26.5, 26.5, 2.23),
        ("embedded:llama-7b", 1024, 0.1, 26.9, 26.9, 2.23),
        ("embedded:llama-70b", 8, 141.1, 246.9, 246.9, 23.4),
        ("embedded:llama-70b", 64, 17.6, 277.8, 277.8, 23.4),
        ("embedded:llama-70b", 1024, 1.1, 281.9, 281.9, 23.4),
    ],
)
def test_a_step_on_h100s(
    model: str, ranks: int, state: float, gather: float, reduce: float, computation: float
) -> None:
    """16 bytes of state a parameter, 16k tokens on each GPU, 400 Gb/s, 40 % of 989 TFLOP/s, a recomputed forward.

    Weights are gathered in bfloat16, those around the blocks once; gradients are reduced in float32.
    """
    config = config_of(AutoModelConfig(repo_name=model, gradient_checkpointing=True), ranks, precision="bf16-mixed")
    size = size_by_hand(model)
    parts = step_plan(config, device="cuda", size_of=lambda *_: size)
    assert (parts.weights + parts.gradients + parts.optimizer) / 1e9 == pytest.approx(state, abs=0.051)
    moved, spent = traffic(config, size, passes=1), step_time(config, size, ClusterConfig())
    assert (moved.gather / 1e9, moved.reduce / 1e9, moved.all_reduce) == pytest.approx((gather, reduce, 0), abs=0.051)
    assert spent.tokens == 16384
    assert spent.communication == pytest.approx((moved.gather + moved.reduce) / 50e9)
    assert spent.computation == pytest.approx(computation, abs=0.006 * computation)


def test_ddp_holds_everything_and_reduces_twice_its_gradients() -> None:
    size = size_by_hand("embedded:llama-7b")
    config = config_of(AutoModelConfig(), 64, strategy="auto")
    parts = step_plan(config, device="cuda", size_of=lambda *_: size)
    assert (parts.weights, parts.gradients, parts.gathered) == (4 * size.parameters, 4 * size.parameters, 0)
    assert traffic(config, size, passes=3) == (0, 0, round(2 * 4 * size.parameters * 63 / 64))


def test_replicas_and_offload() -> None:
    """Eight devices of a machine share the weights; the gradients of 128 machines are averaged."""
    size = size_by_hand("embedded:llama-7b")
    config = config_of(AutoModelConfig(), 1024, replicas=128, precision="bf16-mixed", offload="cpu")
    parts = step_plan(config, device="cuda", size_of=lambda *_: size)
    assert (parts.weights, parts.gradients, parts.optimizer, parts.others) == (0, 0, 0, 0)
    assert parts.gathered == 4 * size.outside + 2 * 2 * size.block + 4 * size.block
    assert step_plan(config, device="cpu", size_of=lambda *_: size).weights == 4 * size.parameters / 8
    moved = traffic(config, size, passes=1)
    assert moved.gather == round(4 * size.parameters * 7 / 8)
    assert moved.all_reduce == round(2 * 4 * size.parameters / 8 * 127 / 128)


def test_several_passes_keep_whole_gradients_and_gather_again() -> None:
    """One pass of 16,384 tokens, or four of 4,096; a group is one row."""
    size = size_by_hand("embedded:llama-7b")
    gathered = []
    for budget in (16384, 4096):
        config = config_of(AutoModelConfig(), 8, SFTConfig(mini_batch_size=29, token_budget=budget))
        passes = passes_of_rank(config, size)
        assert passes == (4, 16384 // budget)
        gathered.append(step_plan(config, device="cuda", size_of=lambda *_: size).gathered)
        assert traffic(config, size, passes=passes[1]).gather == pytest.approx(46.25e9 * passes[1], rel=1e-3)
    assert gathered[1] - gathered[0] == 4 * (size.parameters - size.block)
    groups = GRPOConfig(num_generations=8, mini_batch_size=128, micro_batch_size=8, token_budget=10**6)
    config = config_of(AutoModelConfig(), 8, groups)
    assert passes_of_rank(config, size) == (2, 2)
    sampled = step_plan(config, device="cuda", size_of=lambda *_: size).gathered
    config.rollout = VLLMRolloutConfig()
    served = step_plan(config, device="cuda", size_of=lambda *_: size).gathered
    assert sampled - served == 4 * (size.parameters - size.outside - 2 * size.block)  # a server samples: no gather


@pytest.mark.parametrize(
    ("task", "mode", "precision", "replicas"),
    [
        (SFTConfig(), "ALL", "32-true", 1),
        (SFTConfig(), "LORA", "32-true", 1),
        (SFTConfig(), "ALL", "bf16-mixed", 2),
        (RMConfig(), "ALL", "bf16-mixed", 1),
    ],
)
def test_a_dry_step_moves_the_planned_bytes(
    task: TrainTaskConfig, mode: str, precision: str, replicas: int, model_folder: ModelFolder
) -> None:
    model = AutoModelConfig(repo_name=str(model_folder()), finetune_mode=mode, lora_cfg=LORAConfig(rank=4))
    config = config_of(model, 8, task, devices=str(2 * replicas), precision=precision, replicas=replicas)
    size, seen = measure(model, precision, task.trains == "reward model"), dry_step(config)
    assert seen.unsharded == []
    head = 0 if task.trains == "policy" else 8  # half of the head of a reward model: it is one row, on rank zero
    assert seen.parameters == size.parameters / 2 + head
    assert seen.state == size.trainable_numbers + size.trainable_tensors + 2 * head
    planned = traffic(config, size, passes=1)
    if precision == "bf16-mixed":  # 2 x 2 x 16 gains of norms have 4 bytes, not 2; half of them are received, twice
        planned = planned._replace(gather=planned.gather + 2 * 2 * 2 * 16)
    assert seen.traffic == pytest.approx(planned, abs=20 * head)  # the score head is gathered in float32
    assert (seen.traffic.all_reduce > 0) == (replicas > 1)


def test_tensor_parallel_ranks_share_the_blocks(model_folder: ModelFolder) -> None:
    """Two groups of two: half of a block is gathered, from two ranks; norms of blocks are whole in a group."""
    model = AutoModelConfig(repo_name=str(model_folder()))
    config = config_of(model, 8, SFTConfig(mini_batch_size=8), devices="4", tensor_parallel=2)
    size, norms = measure(model, "32-true"), 2 * 2 * 16
    blocks, moved = size.parameters - size.outside, traffic(config, size, passes=1)
    in_blocks = (blocks - norms) / 2 / 2 + norms / 2
    assert moved == (4 * (size.outside * 3 / 4 + 2 * in_blocks), 4 * (size.outside * 3 / 4 + in_blocks), 0)
    assert passes_of_rank(config, size)[0] == 4
    parts = step_plan(config, device="cuda", size_of=lambda *_: size)
    assert (parts.weights, parts.gathered) == (
        size.weights / 4,
        4 * (size.outside + 2 * size.block / 2 + size.block / 2),
    )
    seen = dry_step(config)
    assert (seen.unsharded, seen.parameters) == ([], (size.parameters - norms) / 4 + norms / 2)
    assert seen.traffic == moved


def test_adapters_and_copies_with_tensor_parallel_ranks(model_folder: ModelFolder) -> None:
    """Each of two copies is on two groups of two; one matrix of an adapter is cut over a group, the other is not."""
    model = AutoModelConfig(repo_name=str(model_folder()), finetune_mode="LORA", lora_cfg=LORAConfig(rank=4))
    config = config_of(model, 8, SFTConfig(mini_batch_size=8), devices="8", tensor_parallel=2, replicas=2)
    size, seen, norms = measure(model, "32-true"), dry_step(config), 2 * 2 * 16
    base, adapters = size.parameters - size.trainable_numbers, size.trainable_numbers
    assert seen.unsharded == [] and seen.traffic.all_reduce > 0
    assert seen.traffic == traffic(config, size, passes=1)
    assert adapters / 4 < seen.parameters - (base - norms) / 4 - norms / 2 < adapters / 2


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "ranks"), [("embedded:llama-7b", 8), ("embedded:llama-70b", 1024)])
def test_a_dry_step_of_a_large_model(name: str, ranks: int) -> None:
    config, size = config_of(AutoModelConfig(repo_name=name), ranks), size_by_hand(name)
    seen = dry_step(config)
    assert (seen.unsharded, seen.collectives) == (
        [],
        {"gather": 2 * SHAPES[name][2] + 1, "reduce": SHAPES[name][2] + 1},
    )
    assert seen.parameters == pytest.approx(size.parameters / ranks, rel=0.01)  # 128,256 rows are no multiple of 1,024
    assert seen.traffic.total() == pytest.approx(traffic(config, size, passes=1).total(), rel=0.01)
    assert seen.seconds < 120  # of the processor


def test_a_pair_is_one_row_of_both_responses(model_folder: ModelFolder) -> None:
    model = AutoModelConfig(repo_name=str(model_folder()))
    data = LocalDataConfig(train_file="rows.jsonl", max_length=100)
    plans = {}
    for task in (SFTConfig(), RMConfig(), DPOConfig()):
        cfg = TrainConfig(task=task, model=model, data=data, fabric=FabricConfig(), optim=AdamWConfig())
        plans[task.config_name] = step_plan(cfg, device="cuda"), rows_of_forward(cfg, measure(model, "32-true"))
    assert [rows for _, rows in plans.values()] == [(20, 100), (10, 200), (10, 200)]
    sft, rm, dpo = (parts for parts, _ in plans.values())
    assert dpo == sft  # no second model, and as many tokens
    assert rm.logits == 0 < dpo.logits
    assert rm.activations == dpo.activations


def test_the_models_of_ppo_are_counted(model_folder: ModelFolder) -> None:
    """All weights: reference and critic besides the policy. With adapters: more adapters. The reward is a model."""
    folder = str(model_folder("gpt2"))
    reward_weights = measure(AutoModelConfig(repo_name=folder), "32-true", True).weights
    data = LocalDataConfig(train_file="rows.jsonl", max_length=100)
    for mode in ("ALL", "LORA"):
        model = AutoModelConfig(repo_name=str(model_folder()), finetune_mode=mode)
        size = measure(model, "32-true")
        for task, others in ((SFTConfig(), 0), (GRPOConfig(), 1), (PPOConfig(), 2)):
            for reward in (FunctionRewardConfig(), ModelRewardConfig(folder=folder)):
                cfg = TrainConfig(
                    task=task, model=model, data=data, fabric=FabricConfig(), optim=AdamWConfig(), reward=reward
                )
                parts = step_plan(cfg, device="cuda")
                scored = isinstance(reward, ModelRewardConfig) and others > 0
                moments = parts.optimizer if others == 2 else 0
                one = size.weights if mode == "ALL" else size.trainable
                models = others if mode == "ALL" else max(0, others - 1)
                assert parts.others == models * one + scored * reward_weights + moments
                assert parts.total() == sum(parts)


@pytest.mark.parametrize(
    ("adapters", "template", "shared"),
    [(True, "plain", True), (True, "chat", False), (False, "plain", False)],
)
def test_a_reward_model_on_the_policys_base_counts_as_adapters(
    adapters: bool, template: str, shared: bool, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """A run of adapters on the same weights; else, or where it is asked in its own template, a whole model."""
    folder, lora = model_folder(), LORAConfig(rank=4)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "adapter_config.json").write_text("{}")
    mode = "LORA" if adapters else "ALL"
    saved = f"{{config_name: auto, repo_name: {folder}, finetune_mode: {mode}, lora_cfg: {{rank: 4}}}}"
    (tmp_path / "config.yaml").write_text(f"model: {saved}\ntask: {{config_name: rm, sft_experiment_dir: null}}\n")
    config = TrainConfig(
        task=GRPOConfig(sft_experiment_dir=None, rm_experiment_dir=str(tmp_path)),
        model=AutoModelConfig(repo_name=str(folder), finetune_mode="LORA", lora_cfg=lora),
        data=LocalDataConfig(train_file="rows.jsonl", max_length=100),
        fabric=FabricConfig(),
        optim=AdamWConfig(),
        reward=ModelRewardConfig(template=template),
    )
    of_reward = AutoModelConfig(repo_name=str(folder), finetune_mode=mode, lora_cfg=lora)
    expected = measure(config.model, "32-true").trainable if shared else measure(of_reward, "32-true", True).weights
    assert step_plan(config, device="cuda").others == expected


def test_rows_of_a_pass_are_those_of_one_process(model_folder: ModelFolder) -> None:
    """Nine rows of a step on four processes are at most three each; two tensor-parallel processes share their rows."""
    model = AutoModelConfig(repo_name=str(model_folder()))
    task = SFTConfig(mini_batch_size=9, micro_batch_size=8, token_budget=10**6)
    for options, rows in (({}, 3), ({"tensor_parallel": 2}, 5), ({"devices": "1"}, 8)):
        config = config_of(model, 8, task, **{"devices": "4"} | options)
        assert rows_of_forward(config, measure(model, "32-true"))[0] == rows


def test_a_moving_reference_and_a_teacher_are_counted(model_folder: ModelFolder) -> None:
    model, teacher = (AutoModelConfig(repo_name=str(model_folder(name))) for name in ("llama", "gpt2"))
    data = LocalDataConfig(train_file="rows.jsonl", max_length=100)
    common: dict[str, Any] = {"model": model, "data": data, "fabric": FabricConfig(), "optim": AdamWConfig()}
    tasks = (DPOConfig(ref_sync_interval=5), DistillConfig(teacher=teacher.repo_name))
    plans = [step_plan(TrainConfig(task=task, reward=NoRewardConfig(), **common), device="cuda") for task in tasks]
    assert [plan.others for plan in plans] == [measure(one, "32-true").weights for one in (model, teacher)]
