"""Classes by name, typed and read-only configurations, the hash that tells runs apart, and options that are read."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sheeprlhf.apps.pipeline import check_stages
from sheeprlhf.config.compose import register_configs
from sheeprlhf.config.option_lookup import catalogue
from sheeprlhf.config.pipeline import stages_of
from sheeprlhf.config.registry import (
    ROOTS,
    choices,
    config_hash,
    config_to_dict,
    configs_directory,
    from_dict,
    groups,
    options,
    to_typed,
)
from sheeprlhf.config.validate import parse_devices, parse_targets, validate
from sheeprlhf.structure.model import LORAConfig
from sheeprlhf.structure.run import AdamConfig, AdamWConfig, ClusterConfig, PipelineConfig, TrainConfig
from tests.support.models import make_model_folder

ROOT = Path(__file__).parents[3]


@functools.cache
def composed(verb, *overrides):
    register_configs()
    with initialize_config_dir(str(configs_directory()), version_base="1.3"):
        return compose(verb, list(overrides))


def typed(*overrides) -> TrainConfig:
    config = to_typed(composed("train", "task=sft", *overrides))
    assert isinstance(config, TrainConfig)
    return config


def every_choice():
    """Each choice at least once: groups that do not depend on each other are composed together.

    Models, datasets and the like of other commands are those of `train`, and are composed once.
    """
    for verb in ROOTS:
        alone = [
            group for group in groups(verb) if group in ("task", "reward", "rollout") and verb in ("train", "eval")
        ]
        together = [group for group in groups(verb) if group not in ("task", "reward", "rollout")]
        for group in [*alone, tuple(together)]:
            names = {name: list(choices(name, verb)) for name in ([group] if isinstance(group, str) else group)}
            count = max(map(len, names.values()), default=0)
            for index in range(count if verb == "train" or isinstance(group, str) else min(count, 1)):
                yield verb, {name: of_name[index % len(of_name)] for name, of_name in names.items()}


def test_all_commands_have_the_choices_of_training():
    for verb in ROOTS:
        for group in {"model", "data", "fabric", "optim"} & set(groups(verb)):
            assert choices(group, verb) == choices(group, "train")


@pytest.mark.parametrize(("verb", "chosen"), list(every_choice()), ids=str)
def test_every_choice_composes_and_is_valid(verb, chosen, tmp_path, monkeypatch):
    monkeypatch.setattr("sheeprlhf.utils.memory.cuda_device_count", lambda: 8)
    monkeypatch.setattr("sheeprlhf.config.validate.missing_modules", lambda modules: [])  # optional packages
    monkeypatch.setattr("sheeprlhf.utils.memory.importlib.metadata.version", lambda package: "2.13.0")
    (tmp_path / "rows.jsonl").write_text("")
    words = {"task": "perplexity" if verb == "eval" else "sft", "model": "tiny", "data": "docstrings", **chosen}
    if "reward" in chosen or chosen.get("rollout") == "vllm":
        words["task"] = "reward" if verb == "eval" else "distill" if chosen.get("reward") == "none" else "ppo"
    words = {key: value for key, value in words.items() if key in groups(verb)}
    needed = {"local": [f"data.train_file='{tmp_path}/rows.jsonl'"], "hub": ["data.dataset_name=owner/name"]}
    needed["mix"] = ["data.mix=[{data:docstrings},{dataset_name:owner/name}]"]
    extra = needed.get(chosen.get("data", ""), [])
    extra += ["model.repo_name=me/mine"] if chosen.get("model") == "auto" else []
    extra += ["reward.terms=[imperative]"] if chosen.get("reward") == "list" else []
    extra += ["reward.folder=me/mine"] if chosen.get("reward") == "model" else []
    extra += ["reward.url=http://127.0.0.1:8000/v1", "reward.judge_model=m"] if chosen.get("reward") == "judge" else []
    extra += ["rollout.urls=[http://127.0.0.1:8000]"] if chosen.get("rollout") == "vllm" else []
    extra += ["task.teacher=me/mine"] if words.get("task") == "distill" else []
    if chosen.get("task") == "prm":
        words["data"], extra = "local", [*extra, *needed["local"]]
    if chosen.get("task") == "frontier":
        (tmp_path / "run" / "final").mkdir(parents=True)
        (tmp_path / "run" / "config.yaml").write_text("task: {config_name: ppo}")
        extra.append(f"experiment_dir='{tmp_path}/run'")
    config = to_typed(composed(verb, *(f"{key}={value}" for key, value in words.items()), *extra))
    for group, name in chosen.items():
        assert type(getattr(config, group)) is choices(group, verb)[name]
    assert validate(config) == []


def check_pipeline(name, monkeypatch):
    """Its stages can be read, and the command of each composes to a valid configuration."""
    monkeypatch.setattr("sheeprlhf.config.validate.cuda_problem", lambda devices: None)
    config = to_typed(composed("pipeline", f"experiment={name}"))
    assert isinstance(config, PipelineConfig)
    stages = stages_of(config)
    assert [stage.name for stage in stages] == list(config.stages)
    check_stages(stages, [])


def config_files():
    """All files of configs/; of pipelines, whose stages are composed too, most are `nightly`."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        late = pytest.mark.slow if path.stem == "quickstart" else pytest.mark.nightly
        yield pytest.param(path, id=path.name, marks=late if "\nstages:" in path.read_text() else ())


def test_every_option_of_a_pipeline_exists():
    known = {entry.option.key for entry in catalogue()} | {group for verb in ROOTS for group in groups(verb)}
    for path in (ROOT / "configs" / "experiment").glob("*.yaml"):
        stages = OmegaConf.to_container(OmegaConf.load(path), resolve=False).get("stages", {})
        words = [word.partition("=") for words in stages.values() for word in words.split() if "=" in word]
        assert {key for key, *_ in words} - known == set(), path


@pytest.mark.parametrize("path", list(config_files()))
def test_every_file_of_configs_composes(path, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("")
    group, name = path.parent.name, path.stem
    if group == "configs":
        needed = {"train": ["task=sft"], "eval": ["task=perplexity"]}
        composed(name, *needed.get(name, []))
    elif "\nstages:" in path.read_text():
        check_pipeline(name, monkeypatch)
    else:
        extra = [f"data.train_file='{tmp_path}/rows.jsonl'"] if "data: local" in path.read_text() else []
        if "/reward: list" in path.read_text():
            members = [make_model_folder(tmp_path / name, scores=True) for name in ("first", "second")]
            extra += [f"reward.terms=[{','.join(f'model:{member}' for member in members)}]"]
        config = to_typed(
            composed(
                "train",
                *(["task=sft"] if group != "experiment" else []),
                f"{group}={name}",
                f"root_dir='{tmp_path}/runs'",
                *extra,
            )
        )
        needs = []  # nothing was trained here
        if "rm_experiment_dir: newest" in path.read_text():
            needs = ["task.sft_experiment_dir=newest, task.rm_experiment_dir=newest"]
        elif "sft_experiment_dir: newest" in path.read_text():
            needs = ["task.sft_experiment_dir=newest"]
        elif "/reward: model" in path.read_text():
            needs = ["task.sft_experiment_dir=auto, task.rm_experiment_dir=newest"]
        assert [problem.partition(":")[0] for problem in validate(config)] == needs


def test_a_typed_configuration_is_read_only_and_hashable():
    config = typed("model.lora_cfg.targets=[q_proj,v_proj]")
    hash(config)
    assert config.optim.betas == (0.9, 0.999)
    for part, name in ((config, "seed"), (config.task, "epochs"), (config.model.lora_cfg, "rank")):
        with pytest.raises(AttributeError, match="read-only"):
            setattr(part, name, 1)


def test_the_hash_is_the_same_in_every_process_and_letter_case():
    code = (
        "from tests.unit.config.test_registry import typed, config_hash; "
        "print(config_hash(typed('model.finetune_mode=lora', 'seed=3')))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout.strip()
        for seed in ("1",)
    }
    assert seen == {config_hash(typed("model.finetune_mode=LORA", "seed=3"))}


def test_what_does_not_change_the_result_does_not_change_the_hash():
    words = ["resume=true", "resume_from=/x", "debug=true", "root_dir=/x", "fabric.devices=2", "task.num_workers=2"]
    words += ["task.token_budget=9", "task.micro_batch_size=9", "model.gradient_checkpointing=true"]
    words += ["fabric.strategy=fsdp2", "fabric.replicas=2", "fabric.offload=cpu", "fabric.tensor_parallel=2"]
    words += ["task.save_interval=9", "task.keep_checkpoints=9"]
    assert config_hash(typed(*words, "task.num_sample_prompts=0")) == config_hash(typed())


def test_what_changes_the_result_changes_the_hash():
    words = ["model=opt", "model.lora_cfg.rank=2", "optim.betas=[0.9,0.95]"]
    assert len({config_hash(typed(*given)) for given in ([], *([word] for word in words))}) == 1 + len(words)


def test_a_saved_group_comes_back_equal():
    config = typed("model=opt", "model.lora_cfg.targets=[q_proj]", "data=helpful_harmless")
    for group in ("model", "data", "task", "fabric", "optim"):
        part = getattr(config, group)
        assert from_dict(group, config_to_dict(part)) == part


def test_a_file_adds_a_model(tmp_path, capsys):
    from sheeprlhf.config.compose import Source, check

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pythia.yaml").write_text(
        "defaults:\n  - auto\n\nconfig_name: pythia\nrepo_name: EleutherAI/pythia-70m\n"
    )
    source = Source("train", str(tmp_path))
    assert check(source, ["task=sft", "model=pythia", "model.lora_cfg.rank=4"]) == []
    [problem] = check(source, ["task=sft", "model=pythiaa"])
    assert "model=pythia?" in problem
    (tmp_path / "model" / "odd.yaml").write_text("defaults:\n  - auto\n\nrepo_nam: x\n")
    [problem] = check(source, ["task=sft", "model=odd"])
    assert "repo_name" in problem
    saved = {"config_name": "pythia", "repo_name": "EleutherAI/pythia-70m"}
    assert config_to_dict(from_dict("model", saved))["repo_name"] == "EleutherAI/pythia-70m"


SNIPPET_OF_2023 = '''
from dataclasses import dataclass
from typing import Optional

from sheeprlhf.structure.model import LORAConfig, ModelConfig


@dataclass
class OPTConfig(ModelConfig):
    """Configurations for OPT based models."""

    config_name: str = "opt"
    repo_name: str = "facebook/opt-350m"
    embedding_dim_name: Optional[str] = "word_embed_proj_dim"
    lora_cfg: Optional[LORAConfig] = LORAConfig(targets="('q_proj','v_proj')")

from tests.unit.config.test_registry import parse_targets, typed, validate
config = typed("model=opt", "model.finetune_mode=LORA")
assert type(config.model) is OPTConfig, type(config.model)
assert parse_targets(config.model.lora_cfg.targets) == ["q_proj", "v_proj"]
assert validate(config) == []
'''


def test_the_model_snippet_of_the_2023_readme_still_runs(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET_OF_2023)  # in a process of its own: it replaces our class
    done = subprocess.run([sys.executable, "snippet.py"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("all-linear", "all-linear"),
        ("ALL-linear", "all-linear"),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("('q_proj','v_proj')", ["q_proj", "v_proj"]),
        ("('c_attn',)", ["c_attn"]),
        ("c_attn", ["c_attn"]),
        (["a", "b.c"], ["a", "b.c"]),
        (("a",), ["a"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ],
)
def test_targets_may_be_written_in_many_ways(given, targets):
    assert parse_targets(given) == targets


@pytest.mark.parametrize("given", ["", "()", [], None, 3, [1], {"a": 1}, "(1, 2)", "a b", "__import__('os')"])
def test_targets_that_name_no_modules_are_refused(given):
    with pytest.raises(ValueError, match=r".*"):
        parse_targets(given)


@pytest.mark.parametrize(
    ("given", "devices"), [("2", 2), ("auto", "auto"), ("-1", "auto"), ("0,1", [0, 1]), ("[3]", [3]), (" 1 ", 1)]
)
def test_devices_may_be_written_in_many_ways(given, devices):
    assert parse_devices(given) == devices


@pytest.mark.parametrize("given", ["0", "two", "", "1,1", "[]", "-2", "0,x"])
def test_devices_that_cannot_be_read_are_refused(given):
    with pytest.raises(ValueError, match=r".*"):
        parse_devices(given)


PACKAGE = Path(__file__).parents[3] / "sheeprlhf"
# These walk over all options alike, which is no use of any one of them.
GENERIC = {"config/registry.py", "config/option_checks.py", "apps/show.py"}

EXPLAINED = {
    "dry_run",  # registry.to_typed turns it into other options' values
    "experiment",  # a label in the saved configuration; Hydra has applied the recipe
}


def names_read() -> set[str]:
    """Every attribute that the package reads, by `.name` or by `getattr(x, "name")`."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in GENERIC:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def test_every_option_is_read_somewhere():
    keys = set()
    for verb, root in ROOTS.items():
        keys |= {option.key for option in options(root()) if option.key not in groups(verb)}
        for group in groups(verb):
            for cls in choices(group, verb).values():
                keys |= {option.key for option in options(cls(), f"{group}.")}
    read = names_read()
    assert sorted(key for key in keys if key.split(".")[-1] not in read and key not in EXPLAINED) == []


def test_configurations_are_equal_if_their_class_and_options_are():
    assert AdamWConfig() == AdamWConfig() and hash(AdamWConfig()) == hash(AdamWConfig())
    assert hash(LORAConfig(modules_to_save=["head"])) == hash(LORAConfig(modules_to_save=["head"]))
    assert AdamWConfig() != AdamWConfig(lr=1.0)
    assert AdamWConfig() != AdamConfig()
    assert {AdamWConfig(lr=1.0): "found"}[AdamWConfig(lr=1.0)] == "found"
    locked = AdamWConfig()
    locked.lock()
    assert locked == AdamWConfig()


def test_a_configuration_is_shown_as_the_call_that_makes_it():
    config = ClusterConfig(memory=80.0)
    assert eval(repr(config)) == config
