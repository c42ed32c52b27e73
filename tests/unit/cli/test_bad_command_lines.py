"""Wrong command lines: one short message that names the key and the fix, exit code 2, nothing started or written."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sheeprlhf.config import path_checks as places
from sheeprlhf.config.option_checks import near_path
from sheeprlhf.utils import memory as machine
from tests.support.runs import exit_code

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "datasets", "lightning", "peft", "pandas")
LONG = "a" * 300

# Words of the command line (@ is the folder that `make_world` fills); what the message must contain.
BAD = [
    # the command
    ("trian task=sft", ["trian", "`train`"]),
    ("task=sft", ["task=sft", "`train`"]),
    ("--train task=sft", ["`train ...`"]),
    ("sft", ["task=sft"]),
    ("train train task=sft", ["train is a command"]),
    ("train", ["sft"]),
    ("eval", ["perplexity", "experiment_dir"]),
    ("train help", ["--help"]),
    ("pipeline sed=1", ["seed?"]),
    ("pipeline ppoo.task.epochs=2", ["ppo.task.epochs"]),
    ("train experiment=quickstart", ["experiment=quickstart"]),
    # flags
    ("train --hlep task=sft", ["--hlep", "--help"]),
    ("train --task=sft", ["task=sft"]),
    ("train task=sft --lr 1e-4", ["optim.lr=1e-4"]),
    ("train task=sft --resume", ["resume=<value>"]),
    ("train task=sft --cfg jobb", ["--cfg jobb"]),
    ("train task=sft --config-dir", ["--config-dir"]),
    ("train task=sft --config-dir=/nowhere/at/all", ["folder"]),
    ("train task=sft --config-dir=@/notes.txt", ["notes.txt", "folder"]),
    ("train task=sft --config-name=trian", ["name=trian"]),
    ("train task=sft --config-path=x", ["--config-path", "--config-dir"]),
    ("train --experimental-rerun job.pickle", ["--experimental-rerun", "unpickle"]),
    # groups
    ("train task=sf", ["task=sf", "task=sft"]),
    ("train task=perplexity", ["task=perplexity"]),
    ("train task=sft model=null", ["model=null", "tiny"]),
    ("train task=[sft]", ["task=[sft]", "grpo"]),
    ("train task=sft model={tiny:1}", ["model={tiny:1}", "gpt2"]),
    ("train task=sft model=opt,gpt2", ["model=opt", "need -m"]),
    ("train -m task=sft,rm task.max_num_steps=1", ["task=sft", "task.max_num_steps"]),
    ("train task=sft +model=opt", ["+model=opt", "model=opt"]),
    ("train task=sft ~optim", ["~optim"]),
    ("train task=sft experiment=pretrain_tny", ["experiment=pretrain_tiny"]),
    ("train sft", ["key=value", "task=sft"]),
    # keys
    ("train task=sft modle=opt", ["model"]),
    ("train task=sft model.lora_cfg.ranc=4", ["model.lora_cfg.rank"]),
    ("train task=sft lr=1e-4", ["optim.lr"]),
    ("train task=sft dry_run", ["key=value", "dry_run=<value>"]),
    ("train task=sft =3", ["seed=1"]),
    ("train task=sft +seed=1", ["+seed=1", "without the +"]),
    ("train task=sft ~seed", ["~seed", "removed"]),
    ("train task=sft data.train_file=x.csv", ["data.train_file", "data=local"]),
    ("train task=sft optim=sgd optim.betas=[0.9,0.9]", ["optim.betas"]),
    ("train task=sft split=test", ["no option split"]),
    ("train task=sft hydra.run.dri=x", ["hydra.run.dri", "hydra.run.dir"]),
    # how they are written
    ("train task = sft", ["task=sft"]),
    ("train task=sft hf_token = verysecret", ["hf_token"]),
    ("train task=sft run_name='a(b", ["run_name='a(b", "quote"]),
    ("train task=sft run_name=a,b", ["need -m", "\"run_name='a,b'\""]),
    ("train task=sft seed=1,2", ["seed=1,2", "-m"]),
    ("train task=sft fabric.devices=[0,1]", ["quote it", "fabric.devices='0,1'"]),
    # types
    ("train task=sft optim.lr=abc", ["optim.lr=abc", "optim.lr=1e-5"]),
    ("train task=sft seed=true", ["seed=true"]),
    ("train task=sft seed=", ["seed=: a whole number is needed"]),
    ("train task=sft dry_run=maybe", ["true or false is needed"]),
    ("train task=sft optim.betas=3", ["a list of 2 numbers is needed"]),
    ("train task=sft optim.betas=[0.9]", ["two numbers"]),
    # numbers out of range
    ("train task=sft optim.lr=-1", ["optim.lr=-1", "0 or more"]),
    ("train task=sft optim.lr=nan", ["optim.lr=nan", "finite"]),
    ("train task=sft seed=4294967296", ["seed=4294967296", "4294967295 or less"]),
    ("train task=sft task.label_smoothing=2", ["0.99 or less"]),
    ("train task=sft generation.temperature=0", ["more than 0"]),
    ("train task=sft data.validation_split=0.5 data.test_split=0.5", ["below 1"]),
    ("train task=sft data.max_prompt_length=128", ["data.max_prompt_length=128", "data.max_length=128", "=96"]),
    ("train task=sft data.reward_model_split=1", ["data.reward_model_split=1", "0.5"]),
    # one of a few names
    ("train task=sft model.finetune_mode=lorra", ["model.finetune_mode=LORA"]),
    # what cannot go together
    ("train task=sft model.lora_cfg.targets=[]", ["model.lora_cfg.targets", "all-linear"]),
    ("train task=sft model.lora_cfg.targets=3", ["model.lora_cfg.targets=3", "[q_proj,v_proj]"]),
    ("train task=sft model.finetune_mode=LORA model.lora_cfg=null", ["model.lora_cfg"]),
    ("train task=sft model.finetune_mode=LORA model.freeze_transformer=true", ["model.freeze_transformer=true"]),
    ("train task=sft model.finetune_mode=LORA model.random_init=true", ["model.random_init=true"]),
    ("train task=sft model.library_cfg.trust_remote_code=true", ["revision=<40-digit"]),
    ("train task=sft generation.num_beams=2 generation.do_sample=true", ["generation.num_beams=1"]),
    ("train task=sft optim=sgd optim.nesterov=true", ["optim.momentum=0.9"]),
    ("train task=sft resume=true resume_from=/tmp", ["resume=true"]),
    # devices and number formats
    ("train task=sft fabric=auto_cuda", ["fabric=cpu"]),
    ("train task=sft fabric.accelerator=gpu", ["fabric.accelerator=cuda"]),
    ("train task=sft fabric.strategy=deepspeed", ["fabric.strategy=fsdp2"]),
    ("train task=sft fabric.devices=two", ["fabric.devices=two", "auto"]),
    ("train task=sft fabric.devices=0", ["fabric.devices=0", "give a number"]),
    ("train task=sft fabric.devices='0,1'", ["number of processes"]),
    ("train task=sft fabric.replicas=2 fabric.offload=cpu", ["fabric.replicas=2", "fabric.offload=cpu"]),
    ("train task=sft fabric.tensor_parallel=2", ["fabric.tensor_parallel=2", "fabric.strategy=fsdp2"]),
    ("train task=sft fabric.strategy=fsdp2 fabric.precision=64-true", ["fabric.precision=32-true"]),
    ("train task=sft fabric.precision=16-true", ["fabric.precision=16-true", "bf16-mixed"]),
    # models
    ("train task=sft model=auto", ["model.repo_name"]),
    ("train task=sft model=auto model.repo_name=@/nowhere", ["nowhere is neither a folder nor a hub id"]),
    ("train task=sft model=auto model.repo_name=a--b/c", ["a--b/c is neither a folder nor a hub id"]),
    (f"train task=sft model=auto model.repo_name={LONG}", ["neither a folder nor a hub id"]),
    ("train task=sft model=auto model.repo_name=@/notes.txt", ["notes.txt", "config.json"]),
    ("train task=sft model=auto model.repo_name=@/empty", ["config.json", "hub's layout"]),
    ("train task=sft model=auto model.repo_name=@/no_config", ["config.json"]),
    ("train task=sft model=auto model.repo_name=@/no_tokenizer", ["tokenizer.json"]),
    (
        "train task=sft model=auto model.repo_name=@/no_weights",
        ["no weights", "model.safetensors", "model.random_init=true"],
    ),
    ("train task=sft model=auto model.repo_name=@/adapters", ["merge_and_unload"]),
    ("train task=sft model.repo_name=embedded:big", ["embedded:big is neither"]),
    ("train task=sft model=opt", ["HF_HUB_OFFLINE", "model.repo_name=<folder>", "model=tiny"]),
    # data
    ("train task=sft data=local", ["data.train_file"]),
    ("train task=sft data=local data.train_file=@/row.jsonl", ["row.jsonl", "rows.jsonl?"]),
    ("train task=sft data=local data.train_file=@/empty", ["give another"]),
    ("train task=sft data=local data.train_file=rows.pickle", ["rows.pickle", ".jsonl"]),
    ("train task=sft data=local data.train_file=@/rows.jsonl data.test_file=/t.csv", ["data.test_file=/t.csv"]),
    ("train task=sft data=summarization", ["HF_HUB_OFFLINE", "data.dataset_name=<folder>"]),
    ("train task=sft data=summarization data.dataset_name=@/empty", ["no file that ends in .parquet"]),
    ("train task=sft data=summarization data.dataset_name=@/notes.txt", ["data.train_file"]),
    ("train task=sft data=summarization data.dataset_name=a--b/c", ["give one"]),
    ("train task=sft data=mix", ["data.mix is missing"]),
    ("train task=sft data=mix data.mix=[{train_file:@/row.jsonl,weight:1}]", ["dataset 1", "rows.jsonl?"]),
    ("train task=sft data=hub data.dataset_name=me/set", ["HF_HUB_OFFLINE", "data.dataset_name=<folder>"]),
    ("train task=sft data=hub data.dataset_name=@/empty data.columns={promt:a}", ["data.columns.promt"]),
    ("train task=sft model.adapter=nosuch data.dataset_name=nowhere", ["model.adapter=nosuch", "dataset_name=nowhere"]),
    ("train task=sft model.adapter=me/no data=hub data.dataset_name=me/set", ["model.adapter=me/no", "dataset me/set"]),
    # places
    ("train task=sft root_dir=/dev/null/runs", ["root_dir=/dev/null/runs"]),
    ("train task=sft hydra.run.dir=@/notes.txt", ["notes.txt", "hydra.run.dir"]),
    ("train task=sft hydra.run.dir=@/run", ["resume=true"]),
    ("train task=sft run_name=a/b", ["run_name=a/b"]),
    (f"train task=sft run_name={LONG}", ["up to 200 characters"]),
    ("train task=sft resume_from=@/notes.txt", ["`list runs`"]),
    ("train task=sft resume_from=@/empty", ["run.json", "`list runs`"]),
    ("train task=sft resume_from=@/run", ["task=sft"]),
    # evaluations
    ("eval task=perplexity", ["experiment_dir", "model=", "data="]),
    ("eval task=perplexity experiment_dir=null", ["experiment_dir=<run"]),
    ("eval task=perplexity experiment_dir=@/rum", ["world/run?"]),
    ("eval task=perplexity experiment_dir=@/run/checkpoints", ["did you mean experiment_dir=", "world/run?"]),
    ("eval task=perplexity experiment_dir=@/empty", ["config.yaml", "`list runs`"]),
    ("eval task=perplexity experiment_dir=@/no_yaml", ["config.yaml", "experiment_dir"]),
    ("eval task=perplexity experiment_dir=@/other_run", ["config.yaml", "'layers'", "model=<choice>"]),
    ("eval task=perplexity experiment_dir=@/lost_model", ["/nowhere/at/all is neither a folder"]),
    ("eval task=perplexity experiment_dir=@/run", ["resume_from=", "task.model_name=last"]),
    ("eval task=perplexity experiment_dir=@/run task.model_name=step-3", ["step-3"]),
    ("eval task=perplexity experiment_dir=@/young_run task.model_name=best", ["no checkpoint", "resume_from="]),
    ("eval task=perplexity model=tiny data.max_length=64", ["data.max_length", "data=<name>"]),
    ("eval task=perplexity model=tiny data=docstrings task.model_name=newest", ["final, best, last or step-<n>"]),
    ("eval task=perplexity model=tiny data=local data.train_file=x.csv task.data_split=reward", ["reward", "empty"]),
    ("eval task=perplexity experiment=pretrain_tiny", ["`train`"]),
    ("eval task=reward experiment_dir=@/rm_run", ["task=preference"]),
    ("eval task=reward model=tiny data=docstrings reward=model", ["newest: ", "task=rm", "data=docstrings"]),
    (
        "eval task=reward model=tiny data=docstrings reward=model task.rm_experiment_dir=@/nowhere",
        ["task.rm_experiment_dir"],
    ),
    (
        "eval task=reward model=tiny data=docstrings reward=model task.rm_experiment_dir=@/sft_run",
        ["task=sft", "task=rm"],
    ),
    ("eval task=reward model=tiny data=docstrings task.rm_experiment_dir=@/rm_run", ["reward=model"]),
    ("eval task=reward model=tiny data=docstrings task.against=start", ["give references"]),
    ("eval task=reward model=tiny data=docstrings task.against=refrences", ["task.against=refrences"]),
    ("eval task=reward model=tiny data=docstrings task.against=@/rm_run", ["task=rm"]),
    ("eval task=reward model=tiny data=docstrings reward.normalize=true", ["reward.normalize=false"]),
    ("eval task=reward model=tiny data=docstrings reward.overlong_buffer=99", ["generation.max_new_tokens"]),
    (
        "eval task=reward model=tiny data=docstrings generation.top_p=0.9",
        ["generation.top_p", "generation.temperature"],
    ),
    ("eval task=perplexity model=tiny data=docstrings reward=model", ["task=perplexity"]),
    ("eval task=generate model=tiny data=docstrings generation.engine=hf", ["generation.engine=hf"]),
    ("eval task=generate experiment_dir=@/lost_adapters", ["has adapters for the model that /nowhere/at/all left"]),
    ("eval task=frontier model=tiny data=docstrings", ["experiment_dir"]),
    ("eval task=frontier experiment_dir=@/random_run", ["needs a start", "random weights"]),
    ("eval task=frontier experiment_dir=@/sft_run task.model_name=best", ["task.model_name=best"]),
    ("train task=sft --plot", ["--plot", "plot=<value>"]),
    ("eval task=perplexity experiment_dir=@/rm_run", ["task=rm", "task=preference"]),
    # runs to start from
    ("train task=dpo task.sft_experiment_dir=newest", ["newest: ", "model=tiny"]),
    ("train task=rm task.sft_experiment_dir=newest root_dir=@ model=gpt2", ["model=gpt2"]),
    ("train task=rm task.sft_experiment_dir=@/sft_rum", ["task.sft_experiment_dir", "sft_run"]),
    ("train task=dpo task.sft_experiment_dir=@/rm_run", ["task=rm", "task=sft"]),
    ("train task=rm task.sft_experiment_dir=@/run", ["task=sft"]),
    ("train task=rm task.sft_experiment_dir=@/sft_run model=gpt2", ["model.repo_name=embedded", "model=tiny"]),
    ("train task=dpo task.sft_experiment_dir=@/lost_sft", ["model.repo_name=/nowhere/at/all"]),
    ("train task=dpo task.sft_experiment_dir=@/young_sft", ["resume_from=", "task.sft_model_name=last"]),
    ("train task=rm task.sft_experiment_dir=@/sft_run model.random_init=true", ["two beginnings: give one of them"]),
    # rewards and preferences
    ("train task=dpo task.label_smoothing=0.5", ["task.label_smoothing=0.5", "0.49 or less"]),
    ("train task=dpo task.loss_type=ipo task.label_smoothing=0.1", ["task.loss_type=ipo"]),
    ("train task=dpo task.simpo_gamma=0.5", ["task.loss_type=sigmoid", "task.loss_type=simpo"]),
    ("train task=grpo task.loss_type=cispo task.max_ratio=4", ["task.max_ratio=4", "task.clip_high"]),
    (
        "train task=grpo task.max_resamples=2 rollout=vllm rollout.urls=[http://localhost:1] rollout.max_staleness=1",
        ["task.max_resamples=2", "rollout.max_staleness=0"],
    ),
    ("train task=dpo task.loss_type=ipo task.ld_alpha=0.5", ["task.ld_alpha=0.5", "sigmoid"]),
    ("train task=dpo task.loss_type=aot task.use_weighting=true", ["task.use_weighting=true", "sigmoid"]),
    ("train task=dpo task.loss_type=orpo task.ref_sync_interval=5", ["task.ref_sync_interval=5", "sigmoid"]),
    ("train task=dpo task.ref_mixup_alpha=0.5", ["task.ref_mixup_alpha=0.5", "task.ref_sync_interval"]),
    ("train task=sft model.frozen_layers=1 model.finetune_mode=LORA", ["model.frozen_layers=1", "layers_to_transform"]),
    ("train task=sft model.frozen_layers=1 model.resize_embeddings=true", ["model.frozen_layers=0"]),
    (
        "train task=ppo reward=list reward.terms=[length] reward.target_length=5 reward.combine=min",
        ["reward.combine=sum"],
    ),
    (
        "train task=ppo reward=list reward.terms=[length] reward.target_length=5 reward.uncertainty_coeff=2",
        ["reward.uncertainty_coeff=2", "reward.combine=uncertainty"],
    ),
    ("train task=distill", ["task.teacher"]),
    ("train task=distill task.teacher=./nowhere", ["task.teacher=./nowhere"]),
    ("train task=grpo reward=none", ["reward=none", "reward=model"]),
    ("train task=ilql model.finetune_mode=LORA", ["model.finetune_mode=ALL"]),
    ("train task=best_of_n rollout.environment=calculator", ["rollout.environment=calculator", "task=best_of_n"]),
    ("train task=prm", ["data=docstrings", "data=local"]),
    (
        "train task=prm data=mix data.mix=[{train_file:@/rows.jsonl,step_separator:x},{train_file:@/rows.jsonl}]",
        ["data.mix", "step_separator"],
    ),
    (
        "train task=sft data=local data.train_file=@/rows.jsonl data.step_separator=x",
        ["data.step_separator", "task=prm"],
    ),
    ("train task=grpo reward=model reward.folder=@/none reward.step_score=each", ["reward.step_score=each", "min"]),
    ("train task=grpo task.max_ratio=1.1", ["task.max_ratio=1.1", "1.2"]),
    ("train task=reinforce_pp task.group_baseline=true", ["task.num_generations=4"]),
    ("train task=sft task.pin_memory=true", ["task.pin_memory", "fabric.accelerator=cpu"]),
    ("train task=dpo task.loss_type=exo", ["task.label_smoothing=0.001"]),
    ("train task=dpo task.loss_type=ipo task.f_divergence=js", ["task.f_divergence=js", "discopop"]),
    ("train task=dpo task.f_alpha=0.3", ["task.f_divergence=alpha"]),
    ("train task=dpo model.freeze_transformer=true", ["task=dpo", "model.finetune_mode=LORA"]),
    ("train task=rm model.finetune_mode=LORA model.freeze_transformer=true", ["leaves no layer for adapters"]),
    # sweeps and recipes
    ("train -m task=sft model=opt,gpt3", ["model=gpt3", "model=gpt2"]),
    ("train task=sft run_name='${oc.env:HOME}'", ["oc.env"]),
    ("train task=sft run_name='${data.nothing}'", ["data.nothing"]),
    # the other commands
    ("inspect split=tset", ["split=tset", "split=test"]),
    ("doctor split=test", ["no option split"]),
    ("doctor cluster.mfu=0.5", ["cluster.*", "cluster.memory="]),
    ("fetch model=auto", ["model.repo_name"]),
    ("fetch task=sft", ["`fetch --help`"]),
    ("list modles", ["modles", "`list models`"]),
    ("show optim.lrr", ["optim.lrr", "optim.lr"]),
    # the nearest is named
    ("perplexity", ["`eval task=perplexity`"]),
    ("OPT", ["`train task=sft model=opt`"]),
    ("auto", ["`train task=sft model=auto`", "`train task=sft fabric=auto`"]),
    ("--cfg job eval", ["`eval --cfg ...`"]),
    ("train --mini-batch-size task=sft", ["task.mini_batch_size=<value>"]),
    ("train --multirn task=sft", ["--multirun"]),
    ("train -x task=sft", ["-x", "`train --help`"]),
    ("train task=sft --info=plugin", ["plugins"]),
    ("train -sc install=bsh", ["install=bash"]),
    ("train task=sft epochs", ["task.epochs=<value>"]),
    ("fetch data=local", ["option data", "`train`, `eval`, `inspect`, `doctor`"]),
]


class Answer(NamedTuple):
    """What became of one command line.

    Attributes:
        code: the exit code.
        out: what it printed.
        err: its message.
        left: files that it left in the working directory.
        heavy: libraries that it was the first to import.
        seconds: CPU time.
    """

    code: int
    out: str
    err: str
    left: list[str]
    heavy: list[str]
    seconds: float


PROGRAM = """
import contextlib, io, json, sys, time
from pathlib import Path
from sheeprlhf.cli import run
from sheeprlhf.config import compose
from tests.support.composed import compose_once
compose._compose_base = compose_once

def ask(words):
    out, err, heavy, start, code = io.StringIO(), io.StringIO(), set(sys.modules), time.process_time(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(words)
        except SystemExit as stop:
            code = stop.code
    seconds = time.process_time() - start
    new = [name for name in {heavy} if name in sys.modules and name not in heavy]
    return code, out.getvalue(), err.getvalue(), [path.name for path in Path().iterdir()], new, seconds

for line in sys.stdin:
    print(json.dumps(ask(json.loads(line))), file=sys.__stdout__, flush=True)
"""


class Asker:
    """A `with` block: the command line in a process of its own, an empty working directory and without a network."""

    def __init__(self, folder: Path) -> None:
        self._world, empty = folder / "world", folder / "empty"
        make_world(self._world)
        empty.mkdir()
        environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "SHEEPRLHF_CACHE": str(folder / "cache"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.replace("{heavy}", repr(HEAVY))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=empty,
            env=environment,
        )

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, line: str) -> Answer:
        assert self._process.stdin and self._process.stdout
        words = [word.replace("@", str(self._world)) for word in line.split()]
        print(json.dumps(words), file=self._process.stdin, flush=True)
        return Answer(*json.loads(self._process.stdout.readline()))


def make_world(world: Path) -> None:
    """Files, model folders and runs, each with something missing."""
    world.mkdir()
    (world / "empty").mkdir()
    (world / "notes.txt").write_text("no data")
    (world / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    models = {
        "no_config": ["tokenizer.json", "model.safetensors"],
        "no_tokenizer": ["config.json", "model.safetensors"],
        "no_weights": ["config.json", "tokenizer.json", "tf_model.h5"],
        "adapters": ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
    }
    for name, files in models.items():
        (world / name).mkdir()
        for file in files:
            (world / name / file).write_text("{}")
    whole = "model: {config_name: tiny}\ndata: {config_name: docstrings}\n"
    configs = {
        "run": whole,
        "young_run": whole,
        "no_yaml": "model: [",
        "other_run": "model: {config_name: tiny, layers: 1}\ndata: {config_name: docstrings}\n",
        "sft_run": whole + "task: {config_name: sft}\n",
        "young_sft": whole + "task: {config_name: sft}\n",
        "rm_run": whole + "task: {config_name: rm}\n",
        "lost_adapters": "model: {config_name: tiny, finetune_mode: LORA}\ndata: {config_name: docstrings}\n"
        "task: {config_name: dpo, sft_experiment_dir: /nowhere/at/all}\n",
        "random_run": "model: {config_name: tiny, random_init: true}\ndata: {config_name: docstrings}\n",
        "lost_sft": "model: {config_name: auto, repo_name: /nowhere/at/all}\ntask: {config_name: sft}\n",
        "lost_model": "model: {config_name: auto, repo_name: /nowhere/at/all}\ndata: {config_name: docstrings}\n",
    }
    for name, text in configs.items():
        (world / name / "final").mkdir(parents=True)
        (world / name / "config.yaml").write_text(text)
    for name in ("run", "young_run", "young_sft"):
        (world / name / "final").rmdir()
    for step in (2, 4):
        (world / "run" / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (world / "sft_run" / "checkpoints" / "step-2").mkdir(parents=True)
    facts = {"status": "running", "config_hash": "another", "started": 1.0, "command": ["train", "task=sft", "seed=3"]}
    (world / "run" / "run.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    """One process that is asked all bad lines."""
    with Asker(tmp_path_factory.mktemp("bad-lines")) as started:
        yield started


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line for line, _ in BAD])
def test_a_bad_command_line_says_what_to_do(line, expected, asker):
    answer = asker.ask(line)
    assert answer.code == 2
    assert answer.out == ""
    for part in expected:
        assert part in answer.err
    assert "Traceback" not in answer.err
    problems = answer.err.count("\n  - ")
    assert 1 <= problems <= 3
    assert len(answer.err.splitlines()) <= 1 + 4 * problems
    assert answer.left == []  # no outputs/, no .hydra/, no run directory
    assert answer.heavy == []  # nothing that takes seconds is imported
    assert answer.seconds < 3  # of CPU: about 0.2


@pytest.mark.parametrize("line", ["train --hf-token verysecret", "train --api_key=verysecret", "hf_token=verysecret"])
def test_a_secret_written_as_a_flag_is_not_repeated(line, capsys):
    assert exit_code(line) == 2
    assert "verysecret" not in capsys.readouterr().err


def test_the_nearest_name_of_a_file(tmp_path):
    (tmp_path / "chat.jsonl").touch()
    assert near_path(str(tmp_path / "chat.json")) == str(tmp_path / "chat.jsonl")
    assert [near_path(path) for path in (f"{tmp_path}/zzz", f"{tmp_path}/no/chat.jsonl", "/")] == [None] * 3


def test_all_problems_are_reported_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert exit_code(["train", "task=sft", "modle=opt", "optim.lr=abc", "generation.top_k=-1", "data=local"]) != 0
    message = capsys.readouterr().err
    for key in ("modle", "optim.lr=abc", "generation.top_k=-1", "data.train_file is missing"):
        assert key in message
    assert message.count("\n  - ") == 4


def test_a_cuda_machine_is_asked_for_the_number_of_devices(monkeypatch):
    monkeypatch.setattr(machine, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "2.13.0")
    assert machine.cuda_problem(1) is None
    assert "fabric.devices=1" in (machine.cuda_problem(2) or "")
    assert "fabric.devices=1" in (machine.cuda_problem([0, 1]) or "")
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert "CPU build" in (machine.cuda_problem(1) or "")


def test_an_unwritable_folder_is_found_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)
    assert f"root_dir={tmp_path / 'runs'}" in next(places.new_folder_problems("root_dir", str(tmp_path / "runs")))


WORDS = ["train", "task=ppo", "reward=function", "reward.path=sentiment"]


def test_a_missing_package_is_one_line_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.chdir(tmp_path)
    assert exit_code(WORDS) == 2
    assert capsys.readouterr().err.splitlines() == [
        "sheeprlhf cannot continue:",
        "  - reward.path=sentiment needs packages that are not installed (vaderSentiment): "
        'pip install "sheeprlhf[sentiment]"',
    ]
    assert list(tmp_path.iterdir()) == []
