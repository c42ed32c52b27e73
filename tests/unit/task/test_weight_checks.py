"""Which weights a job loads, and that they are accounted for before its data is prepared and its directory is made."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sheeprlhf.model.adapter import add_lora
from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.reward import ModelRewardConfig
from sheeprlhf.structure.rollout import GRPOConfig
from sheeprlhf.structure.run import EvalConfig, TrainConfig
from sheeprlhf.structure.task import DPOConfig, RMConfig
from sheeprlhf.task.weight_checks import Needed, check_needed, models_of
from sheeprlhf.utils.errors import ModelError
from tests.support.models import ModelFolder
from tests.support.runs import WRITERS, rejected, train_words


@pytest.mark.parametrize("task", ["dpo", "rm", "ppo"])
def test_a_hole_ends_training_before_anything_is_made(
    task: str,
    tmp_path: Path,
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    data = WRITERS[task](tmp_path / "rows.jsonl")
    message = rejected(train_words(folder, data, tmp_path / "run", task=task), capsys)
    assert "model.layers.0.mlp.down_proj.weight" in message and f"model.repo_name={folder}" in message
    assert not (tmp_path / "cache").exists() and not list((tmp_path / "run").glob("*"))


def test_a_language_model_as_reward_folder(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path / "cache"))
    data, folder = WRITERS["grpo"](tmp_path / "rows.jsonl"), model_folder()
    of_training = train_words(folder, data, tmp_path / "run", task="grpo")
    for words in (
        [*(word for word in of_training if not word.startswith("reward")), "reward=model", f"reward.folder={folder}"],
        [
            *("eval", "task=reward", "model=auto", f"model.repo_name={folder}", "data=local", "reward=model"),
            *(f"data.train_file={data}", f"reward.folder={folder}", f"output_dir={tmp_path}/eval"),
        ],
    ):
        message = rejected(words, capsys)
        assert f"reward.folder={folder}" in message and "score.weight" in message and "model.repo_name" not in message
    assert not (tmp_path / "cache").exists() and not list((tmp_path / "run").glob("*"))


def test_which_models_a_job_loads(tmp_path: Path) -> None:
    """A run's whole `final/`, else what its adapters are put on; the reward's folder."""
    model = AutoModelConfig(repo_name="me/base")

    def made(name: str, task: str, *, adapters: bool, start: str = "null") -> str:
        final = tmp_path / name / "final"
        final.mkdir(parents=True)
        (final / ("adapter_config.json" if adapters else "config.json")).write_text("{}")
        of_task = f"{{config_name: {task}{f', sft_experiment_dir: {start}' if task == 'rm' else ''}}}"
        saved = f"model: {{config_name: auto, repo_name: me/base}}\ntask: {of_task}"
        (final.parent / "config.yaml").write_text(saved)
        return str(final.parent)

    def found(config: TrainConfig | EvalConfig) -> list[tuple[str | None, bool, bool]]:
        needed = [need for need in models_of(config) if need.adapters is None]
        return [(need.model.repo_name, need.scores, need.new_head) for need in needed]

    whole, adapted = made("whole", "sft", adapters=False), made("adapted", "sft", adapters=True)
    rm = made("rm", "rm", adapters=False)
    rm_adapted = made("rm_adapted", "rm", adapters=True, start=whole)
    cfg = TrainConfig(task=RMConfig(), model=model)
    cfg.data = type("Data", (), {"rule_reward": None})()
    assert found(cfg) == [("me/base", False, True)]
    cfg.task = DPOConfig(sft_experiment_dir=whole)
    assert found(cfg) == [(f"{whole}/final", False, False)]
    cfg.task = DPOConfig(sft_experiment_dir=adapted)
    assert found(cfg) == [("me/base", False, False)]
    cfg.task, cfg.reward = GRPOConfig(sft_experiment_dir=None), ModelRewardConfig(folder="me/reward")
    assert found(cfg) == [("me/base", False, False), ("me/reward", True, False)]
    cfg.task, cfg.reward = GRPOConfig(sft_experiment_dir=None, rm_experiment_dir=rm), ModelRewardConfig()
    assert found(cfg) == [("me/base", False, False), (f"{rm}/final", True, False)]
    cfg.task = GRPOConfig(sft_experiment_dir=None, rm_experiment_dir=rm_adapted)
    assert found(cfg) == [("me/base", False, False), (f"{whole}/final", False, False)]
    [adapters] = [need for need in models_of(cfg) if need.adapters is not None]
    assert adapters.adapters == Path(rm_adapted, "final") and adapters.scores
    assert adapters.model.repo_name == f"{whole}/final"


@pytest.mark.parametrize("change", ["missing", "another shape"])
def test_adapters_are_accounted_for_by_the_header(change: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    cfg = AutoModelConfig(repo_name=str(model_folder()), finetune_mode="LORA")
    assert cfg.lora_cfg is not None
    add_lora(load_causal_lm(cfg, vocabulary=0, longest=0), cfg.lora_cfg).save_pretrained(tmp_path)
    needed = Needed(cfg, adapters=tmp_path)
    assert check_needed(needed, print) == ""
    path, name = tmp_path / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors = load_file(path)
    tensors |= {name: torch.ones(3, 4)} if change == "another shape" else {}
    save_file({key: tensor for key, tensor in tensors.items() if key != name or change != "missing"}, path)
    with pytest.raises(ModelError, match=f"{tmp_path}: these adapters cannot be loaded: {name} .*{change}"):
        check_needed(needed, print)


EXCLUDED = [  # the task (an evaluation: perplexity), the architecture, the options, and the one that is named
    ("sft", "gpt_neo", "task.batching=packed", "task.batching=packed"),
    ("sft", "llama", "task.batching=packed model.attn_implementation=eager", "model.attn_implementation=eager"),
    ("sft", "llama", "model.freeze_transformer=true", "model.freeze_transformer=true"),
    ("sft", "llama", "model.finetune_mode=LORA model.lora_cfg.targets=[lm_head]", "model.lora_cfg.targets"),
    ("dpo", "llama", "model.finetune_mode=LORA model.lora_cfg.targets=[q_prj,q_proj]", "q_prj"),
    ("grpo", "llama", "model.finetune_mode=LORA model.lora_cfg.targets=[lm_head,q_proj]", "model.lora_cfg.targets"),
    ("ppo", "mamba", "", "critic"),
    ("sft", "falcon", "model.chat_template=nothing", "model.chat_template=nothing"),
    ("sft", "falcon", "data.template_args={enable_thinking:false}", "data.template_args"),
    ("perplexity", "falcon", "task.batching=packed", "task.batching=packed"),
    ("perplexity", "falcon", "model.chat_template=nothing", "model.chat_template=nothing"),
    ("perplexity", "falcon", "data.template_args={enable_thinking:false}", "data.template_args"),
]


@pytest.mark.parametrize(("task", "architecture", "words", "said"), EXCLUDED)
def test_options_that_the_model_excludes_are_rejected_before_anything_is_made(
    task: str,
    architecture: str,
    words: str,
    said: str,
    tmp_path: Path,
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path / "cache"))
    data, out = WRITERS.get(task, WRITERS["sft"])(tmp_path / "rows.jsonl"), tmp_path / "run"
    if task == "perplexity":
        command = ["eval", "task=perplexity", "model=auto", f"model.repo_name={model_folder(architecture)}"]
        command += ["data=local", f"data.train_file={data}", f"data.test_file={data}", f"output_dir={out}"]
    else:
        command = train_words(model_folder(architecture), data, out, task=task)
    assert said in rejected([*command, *words.split()], capsys)
    assert not (tmp_path / "cache").exists() and not list(out.glob("*"))
