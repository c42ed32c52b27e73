"""The bad command lines, what must be said to each, and the process that is asked them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "datasets", "lightning", "peft", "pandas")
LONG = "a" * 300

# Words of the command line (@ is the folder that `make_world` fills); what the message must contain.
BAD = [
    # the command
    ("trian task=sft", ["trian", "`train`"]),
    ("task=sft", ["task=sft is not a command", "`train`"]),
    ("--train task=sft", ["commands have no dashes", "`train ...`"]),
    ("sft", ["`train task=sft`"]),
    ("train train task=sft", ["train is a command", "at the start"]),
    ("train", ["task is missing", "sft"]),
    ("eval", ["task is missing", "perplexity", "experiment_dir"]),
    ("train help", ["did you mean --help?"]),
    ("pipeline experiment=quikstart", ["experiment=quikstart", "experiment=quickstart"]),
    ("pipeline sed=1", ["there is no stage and no option sed", "seed?", "sft, rm, ppo, dpo"]),
    ("pipeline ppoo.task.epochs=2", ["did you mean ppo.task.epochs?"]),
    ("train experiment=quickstart", ["write pipeline experiment=quickstart"]),
    # flags
    ("train --hlep task=sft", ["--hlep", "--help"]),
    ("train --task=sft", ["options have no dashes; write task=sft"]),
    ("train task=sft --model opt", ["write model=opt"]),
    ("train task=sft --task.epochs=3", ["write task.epochs=3"]),
    ("train task=sft --lr 1e-4", ["optim.lr=1e-4"]),
    ("train task=sft --resume", ["resume=<value>"]),
    ("train task=sft --cfg jobb", ["--cfg jobb", "did you mean job?"]),
    ("train task=sft --config-dir", ["--config-dir needs a value"]),
    ("train task=sft --config-dir=/nowhere/at/all", ["/nowhere/at/all", "folder"]),
    ("train task=sft --config-dir=@/notes.txt", ["notes.txt is not a directory", "folder"]),
    ("train task=sft --config-name=trian", ["--config-name=trian", "did you mean train?"]),
    ("train task=sft --config-path=x", ["--config-path", "--config-dir"]),
    ("train --experimental-rerun job.pickle", ["--experimental-rerun", "unpickle"]),
    # groups
    ("train task=sf", ["task=sf", "task=sft"]),
    ("train task=perplexity", ["task=perplexity", "eval task=perplexity"]),
    ("eval task=sft", ["task=sft", "train task=sft"]),
    ("train task=sft model=optt", ["model=optt", "model=opt"]),
    ("train task=sft model=OPT", ["model=OPT", "model=opt"]),
    ("train task=sft data=summarisation", ["data=summarization"]),
    ("train task=sft optim=adamm", ["optim=adamm", "optim=adam"]),
    ("train task=sft fabric=gpu", ["fabric=gpu", "fabric=auto_cuda"]),
    ("train task=sft model=null", ["model=null", "tiny"]),
    ("train task=sft model=opt,gpt2", ["model=opt,gpt2", "need -m"]),
    (
        "train -m task=sft,rm task.max_num_steps=1",
        ["task=sft,rm in a sweep", "task.max_num_steps", "a command of its own"],
    ),
    ("train task=sft +model=opt", ["+model=opt", "write model=opt"]),
    ("train task=sft ~optim", ["~optim", "cannot be removed"]),
    ("train task=sft experiment=pretrain_tny", ["experiment=pretrain_tiny"]),
    ("train sft", ["sft is not key=value", "task=sft"]),
    # keys
    ("train task=sft modle=opt", ["no option modle", "model"]),
    ("train task=sft model.lora_cfg.ranc=4", ["model.lora_cfg.rank"]),
    ("train task=sft lr=1e-4", ["no option lr", "optim.lr"]),
    ("train task=sft epoch=3", ["task.epochs"]),
    ("train task=sft dry_run", ["dry_run is not key=value", "dry_run=<value>"]),
    ("train task=sft =3", ["=3 has no key", "seed=1"]),
    ("train task=sft +task.beta=1", ["task.beta is an option of task=dpo", "remove task.beta"]),
    ("train task=sft +seed=1", ["+seed=1", "without the +"]),
    ("train task=sft ++seed=x", ["++seed=x: a whole number is needed"]),
    ("train task=sft ~seed", ["~seed", "removed"]),
    ("train task=sft data.train_file=x.csv", ["data.train_file", "data=local"]),
    ("train task=sft optim=sgd optim.betas=[0.9,0.9]", ["optim.betas is an option of optim=adamw"]),
    ("train task=sft split=test", ["no option split", "`inspect` has split"]),
    ("train task=sft hydra.run.dri=x", ["hydra.run.dri", "hydra.run.dir"]),
    # how they are written
    ("train task = sft", ["no spaces around =: write task=sft"]),
    ("train task=sft seed= 3", ["no spaces around =: write seed=3"]),
    ("train task=sft seed =3", ["no spaces around =: write seed=3"]),
    ("train task=sft hf_token = verysecret", ["hf_token: credentials never go"]),
    ("train task=sft run_name=a(b", ["run_name=a(b", "quote", "\"run_name='...'\""]),
    ("train task=sft run_name=it's", ["run_name=it's", "quote"]),
    ("train task=sft run_name=a,b", ["need -m", "\"run_name='a,b'\""]),
    ("train task=sft seed=1,2", ["seed=1,2", "-m"]),
    ("train task=sft seed=range(1,3)", ["seed=range(1,3)", "-m"]),
    ("train task=sft fabric.devices=[0,1]", ["quote it", "fabric.devices='0,1'"]),
    # types
    ("train task=sft optim.lr=abc", ["optim.lr=abc: a number is needed", "for example optim.lr=1e-5"]),
    ("train task=sft task.epochs=1.5", ["task.epochs=1.5: a whole number is needed"]),
    ("train task=sft task.mini_batch_size=many", ["a whole number is needed", "task.mini_batch_size=32"]),
    ("train task=sft seed=true", ["seed=true: a whole number is needed"]),
    ("train task=sft seed=", ["seed=: a whole number is needed"]),
    ("train task=sft dry_run=maybe", ["true or false is needed"]),
    ("train task=sft run_name=null", ["run_name=null: a value is needed"]),
    ("train task=sft optim.betas=3", ["a list of 2 numbers is needed"]),
    ("train task=sft optim.betas=[0.9]", ["two numbers"]),
    # numbers out of range
    ("train task=sft optim.lr=-1", ["optim.lr=-1", "0 or more"]),
    ("train task=sft optim.lr=nan", ["optim.lr=nan", "finite"]),
    ("train task=sft seed=-1", ["seed=-1", "0 or more"]),
    ("train task=sft seed=4294967296", ["seed=4294967296", "4294967295 or less"]),
    ("train task=sft task.token_budget=0", ["task.token_budget=0", "1 tokens or more"]),
    ("train task=sft task.mini_batch_size=-3", ["task.mini_batch_size=-3", "1 rows or more"]),
    ("train task=sft task.micro_batch_size=0", ["task.micro_batch_size=0", "1"]),
    ("train task=sft task.eval_interval=0", ["task.eval_interval=0", "1 optimizer steps or more"]),
    ("train task=sft task.label_smoothing=2", ["0.99 or less"]),
    ("train task=sft model.lora_cfg.rank=0", ["model.lora_cfg.rank=0", "1 or more"]),
    ("train task=sft generation.top_p=1.5", ["generation.top_p=1.5", "1 or less"]),
    ("train task=sft generation.temperature=0", ["more than 0"]),
    ("train task=sft data.validation_split=0.5 data.test_split=0.5", ["below 1"]),
    ("train task=sft data.max_prompt_length=128", ["data.max_prompt_length=128", "data.max_length=128", "=96"]),
    ("train task=sft data.reward_model_split=1", ["data.reward_model_split=1", "0.5"]),
    # one of a few names
    ("train task=sft model.finetune_mode=lorra", ["model.finetune_mode=LORA"]),
    ("train task=sft model.dtype=fp16", ["model.dtype=float16"]),
    ("train task=sft optim.schedule=cosin", ["optim.schedule=cosine"]),
    # what cannot go together
    ("train task=sft model.lora_cfg.targets=[]", ["model.lora_cfg.targets", "all-linear"]),
    ("train task=sft model.lora_cfg.targets=3", ["model.lora_cfg.targets=3", "[q_proj,v_proj]"]),
    ("train task=sft model.finetune_mode=LORA model.lora_cfg=null", ["needs model.lora_cfg"]),
    ("train task=sft model.lora_cfg=null model.lora_cfg.rank=4", ["model.lora_cfg is null"]),
    ("train task=sft model.finetune_mode=LORA model.freeze_transformer=true", ["model.freeze_transformer=true"]),
    ("train task=sft model.finetune_mode=LORA model.random_init=true", ["model.random_init=true"]),
    ("train task=sft model.library_cfg.trust_remote_code=true", ["runs Python code", "revision=<40-digit commit>"]),
    ("train task=sft generation.num_beams=2 generation.do_sample=true", ["generation.num_beams=1"]),
    ("train task=sft optim=sgd optim.nesterov=true", ["optim.momentum=0.9"]),
    ("train task=sft resume=true resume_from=/tmp", ["resume=true and resume_from"]),
    # devices and number formats
    ("train task=sft fabric=auto_cuda", ["fabric=cpu"]),
    ("train task=sft fabric.accelerator=gpu", ["fabric.accelerator=cuda"]),
    ("train task=sft fabric.strategy=deepspeed", ["fabric.strategy=fsdp2"]),
    ("train task=sft fabric.devices=two", ["fabric.devices=two", "auto"]),
    ("train task=sft fabric.devices=0", ["fabric.devices=0", "give a number"]),
    ("train task=sft fabric.devices='0,1'", ["which a CPU has not"]),
    ("train task=sft fabric.strategy=dpp", ["fabric.strategy=ddp"]),
    ("train task=ppo fabric.strategy=fsdp2", ["trains task=sft, rm, dpo alone", "fabric.strategy=ddp"]),
    ("train task=kto fabric.strategy=fsdp2", ["not task=kto", "fabric.strategy=ddp"]),
    ("train task=grpo fabric.strategy=fsdp2", ["not task=grpo", "fabric.strategy=ddp"]),
    ("eval task=perplexity fabric.strategy=fsdp2", ["not task=perplexity", "fabric.strategy=ddp"]),
    ("train task=sft fabric.strategy=fsdp2 fabric.precision=64-true", ["fabric.precision=32-true"]),
    ("train task=sft fabric.precision=16-true", ["fabric.precision=16-true", "bf16-mixed"]),
    ("train task=sft fabric=auto fabric.precision=16-true", ["needs a CUDA device", "bf16-mixed"]),
    ("eval task=perplexity model=tiny data=docstrings fabric.precision=16-true", ["needs a CUDA device", "bf16-mixed"]),
    ("train task=sft fabric.precision=16-mixed", ["fabric.precision=16-mixed", "bf16-mixed"]),
    # models
    ("train task=sft model=auto", ["model.repo_name is missing"]),
    ("train task=sft model=auto model.repo_name=null", ["model.repo_name=null", "hub id (owner/name)"]),
    ("train task=sft model=auto model.repo_name=@/nowhere", ["nowhere is neither a folder nor a hub id"]),
    ("train task=sft model=auto model.repo_name=a--b/c", ["a--b/c is neither a folder nor a hub id"]),
    (f"train task=sft model=auto model.repo_name={LONG}", ["neither a folder nor a hub id"]),
    (
        "train task=sft model=auto model.repo_name=@/notes.txt",
        ["notes.txt is a file", "the folder that has config.json"],
    ),
    ("train task=sft model=auto model.repo_name=@/empty", ["has no config.json", "hub's layout"]),
    ("train task=sft model=auto model.repo_name=@/no_config", ["has no config.json"]),
    ("train task=sft model=auto model.repo_name=@/no_tokenizer", ["has no tokenizer", "tokenizer.json"]),
    (
        "train task=sft model=auto model.repo_name=@/no_weights",
        ["no weights", "model.safetensors", "model.random_init=true"],
    ),
    ("train task=sft model=auto model.repo_name=@/adapters", ["adapters and no model", "merge_and_unload"]),
    ("train task=sft model.repo_name=embedded:big", ["embedded:big is neither"]),
    ("train task=sft model=opt", ["HF_HUB_OFFLINE is set", "model.repo_name=<folder>", "model=tiny"]),
    ("train task=sft model=smollm2", ["HF_HUB_OFFLINE is set", "`python sheeprlhf.py fetch model=smollm2`"]),
    # data
    ("train task=sft data=local", ["data.train_file is missing"]),
    ("train task=sft data=local data.train_file=@/row.jsonl", ["row.jsonl is not a file", "rows.jsonl?"]),
    ("train task=sft data=local data.train_file=@/empty", ["empty is a folder without", "give another"]),
    ("train task=sft data=local data.train_file=rows.pickle", ["rows.pickle", ".jsonl"]),
    ("train task=sft data=local data.train_file=@/rows.jsonl data.test_file=/t.csv", ["data.test_file=/t.csv is not"]),
    ("train task=sft data=summarization", ["HF_HUB_OFFLINE is set", "data.dataset_name=<folder>"]),
    ("train task=sft data=summarization data.dataset_name=@/empty", ["no file that ends in .parquet"]),
    ("train task=sft data=summarization data.dataset_name=@/notes.txt", ["use data=local data.train_file="]),
    ("train task=sft data=summarization data.dataset_name=a--b/c", ["neither a folder nor a hub id", "give one"]),
    # places
    ("train task=sft root_dir=/dev/null/runs", ["root_dir=/dev/null/runs", "is not a folder"]),
    ("train task=sft data.cache_dir=/dev/null/x", ["data.cache_dir=/dev/null/x", "is not a folder"]),
    ("train task=sft hydra.run.dir=@/notes.txt", ["notes.txt is not a directory", "another place"]),
    ("train task=sft hydra.run.dir=@/run", ["holds a run already", "resume=true"]),
    ("train task=sft run_name=a/b", ["run_name=a/b"]),
    ("train task=sft run_name=", ["run_name= cannot name a directory"]),
    (f"train task=sft run_name={LONG}", ["up to 200 characters"]),
    ("train task=sft resume_from=/nowhere", ["resume_from=/nowhere"]),
    ("train task=sft resume_from=@/notes.txt", ["is not a directory", "`list runs`"]),
    ("train task=sft resume_from=@/empty", ["run.json", "`list runs`"]),
    ("train task=sft resume_from=@/run", ["belongs to another configuration", "train task=sft seed=3"]),
    # evaluations
    ("eval task=perplexity", ["experiment_dir", "model=", "data="]),
    ("eval task=perplexity experiment_dir=null", ["nothing to evaluate", "experiment_dir=<run directory>"]),
    ("eval task=perplexity experiment_dir=@/rum", ["rum is not a directory", "world/run?"]),
    ("eval task=perplexity experiment_dir=@/notes.txt", ["notes.txt is not a directory", "`list runs`"]),
    ("eval task=perplexity experiment_dir=@/empty", ["has no config.yaml", "`list runs`"]),
    ("eval task=perplexity experiment_dir=@/no_yaml", ["config.yaml cannot be read", "another experiment_dir"]),
    ("eval task=perplexity experiment_dir=@/other_run", ["config.yaml", "'layers'", "give model=<choice>"]),
    ("eval task=perplexity experiment_dir=@/lost_model", ["/nowhere/at/all is neither a folder"]),
    ("eval task=perplexity experiment_dir=@/run", ["no final/ yet", "resume_from=", "task.model_name=last"]),
    ("eval task=perplexity experiment_dir=@/run task.model_name=step-3", ["step-3", "it has step-2, step-4"]),
    ("eval task=perplexity experiment_dir=@/young_run task.model_name=best", ["no checkpoint", "resume_from="]),
    ("eval task=perplexity model=tiny data.max_length=64", ["data.max_length cannot be set", "data=<name>"]),
    ("eval task=perplexity model=tiny data=docstrings task.model_name=newest", ["final, best, last or step-<n>"]),
    ("eval task=perplexity model=tiny data=local data.train_file=x.csv task.data_split=reward", ["reward", "empty"]),
    ("eval task=perplexity experiment=pretrain_tiny", ["no option experiment", "`train`"]),
    ("eval task=rm", ["task=rm belongs to `train`", "train task=rm"]),
    ("eval task=reward", ["nothing to evaluate", "experiment_dir=<run directory>"]),
    ("eval task=reward experiment_dir=@/nowhere", ["nowhere is not a directory", "`list runs`"]),
    ("eval task=reward experiment_dir=@/rm_run", ["trained a reward model: give task=preference, or another run"]),
    ("eval task=reward experiment_dir=@/run", ["no final/ yet", "task.model_name=last"]),
    ("eval task=reward experiment_dir=@/sft_run task.model_name=step-3", ["step-3", "it has step-2"]),
    (
        "eval task=reward model=tiny data=docstrings reward=model",
        ["newest: ", "logs/runs has no finished run of task=rm", "train task=rm model=tiny data=docstrings"],
    ),
    (
        "eval task=reward model=tiny data=docstrings reward=model task.rm_experiment_dir=@/nowhere",
        ["task.rm_experiment_dir=", "nowhere is not a directory"],
    ),
    (
        "eval task=reward model=tiny data=docstrings reward=model task.rm_experiment_dir=@/sft_run",
        ["is a run of task=sft, which trains a policy", "give a run of task=rm"],
    ),
    ("eval task=reward model=tiny data=docstrings reward=modl", ["reward=modl", "reward=model"]),
    (
        "eval task=reward model=tiny data=docstrings task.rm_experiment_dir=@/rm_run",
        ["is not read by reward=auto: remove it, or give reward=model"],
    ),
    ("eval task=reward model=tiny data=docstrings task.against=start", ["has no start", "give references"]),
    (
        "eval task=reward model=tiny data=docstrings task.against=refrences",
        ["task.against=refrences is not a directory", "it may also be references or start"],
    ),
    (
        "eval task=reward model=tiny data=docstrings task.against=@/rm_run",
        ["this run of task=rm trained a reward model: give another"],
    ),
    ("eval task=reward model=tiny data=docstrings task.against=@/young_sft", ["no final/ yet"]),
    ("eval task=reward model=tiny data=docstrings reward.normalize=true", ["give reward.normalize=false"]),
    ("eval task=reward model=tiny data=docstrings reward.overlong_cache=99", ["more than generation.max_new_tokens"]),
    (
        "eval task=reward model=tiny data=docstrings generation.top_p=0.9",
        ["generation.top_p: task=reward samples with all probabilities", "give generation.temperature"],
    ),
    ("eval task=perplexity model=tiny data=docstrings reward=model", ["reward=model is not read by task=perplexity"]),
    ("eval task=generate model=tiny data=docstrings generation.engine=hf", ["generation.engine=hf is not read"]),
    ("eval task=generate experiment_dir=@/lost_adapters", ["has adapters for the model that /nowhere/at/all left"]),
    ("eval task=preference", ["nothing to evaluate"]),
    ("eval task=preference model=tiny data=docstrings task.beta=0", ["task.beta=0", "more than 0"]),
    ("eval task=frontier model=tiny data=docstrings", ["goes over the checkpoints of a run: give experiment_dir"]),
    ("eval task=frontier experiment_dir=@/young_run", ["no checkpoint", "resume_from="]),
    ("eval task=frontier experiment_dir=@/random_run", ["needs a start", "random weights"]),
    ("eval task=frontier experiment_dir=@/sft_run task.model_name=best", ["task.model_name=best is not read"]),
    ("eval task=frontier experiment_dir=@/rm_run", ["trained a reward model: give task=preference"]),
    ("train task=sft --plot", ["there is no flag --plot", "write plot=<value>"]),
    (
        "eval task=perplexity experiment_dir=@/rm_run",
        ["this run of task=rm trained a reward model", "give task=preference"],
    ),
    ("eval task=rouge experiment_dir=@/rm_run", ["this run of task=rm trained a reward model", "task=preference"]),
    ("eval task=preference experiment_dir=@/rm_run task.model_name=best", ["no checkpoint", "resume_from="]),
    # runs to start from
    (
        "train task=dpo task.sft_experiment_dir=newest",
        ["newest: ", "logs/runs has no", "train task=sft model=tiny data=docst"],
    ),
    (
        "train task=rm task.sft_experiment_dir=newest root_dir=@ model=gpt2",
        ["openai-community/gpt2: first", "model=gpt2"],
    ),
    (
        "train task=rm task.sft_experiment_dir=@/nowhere",
        ["task.sft_experiment_dir=", "is not a directory", "`list runs`"],
    ),
    ("train task=rm task.sft_experiment_dir=@/sft_rum", ["did you mean task.sft_experiment_dir=", "world/sft_run?"]),
    ("train task=dpo task.sft_experiment_dir=@/notes.txt", ["notes.txt is not a directory", "`list runs`"]),
    ("train task=dpo task.sft_experiment_dir=@/empty", ["has no config.yaml", "`list runs`"]),
    ("train task=dpo task.sft_experiment_dir=@/no_yaml", ["cannot be read", "give another task.sft_experiment_dir"]),
    ("train task=dpo task.sft_experiment_dir=@/rm_run", ["a run of task=rm, which trains a reward model", "task=sft"]),
    ("train task=rm task.sft_experiment_dir=@/rm_run", ["a run of task=rm, which trains a reward model", "task=sft"]),
    ("train task=rm task.sft_experiment_dir=@/run", ["is a run of no known task", "give a run of task=sft"]),
    (
        "train task=rm task.sft_experiment_dir=@/sft_run model=gpt2",
        ["was trained from model.repo_name=embedded:tiny, and this run has openai-community/gpt2", "give model=tiny,"],
    ),
    ("train task=dpo task.sft_experiment_dir=@/lost_sft", ["give model=auto model.repo_name=/nowhere/at/all"]),
    (
        "train task=dpo task.sft_experiment_dir=@/young_sft",
        ["no final/ yet", "resume_from=", "task.sft_model_name=last"],
    ),
    ("train task=dpo task.sft_experiment_dir=@/young_sft task.sft_model_name=best", ["no checkpoint", "resume_from="]),
    ("train task=rm task.sft_experiment_dir=@/sft_run task.sft_model_name=step-3", ["step-3", "it has step-2"]),
    ("train task=rm task.sft_experiment_dir=@/sft_run task.sft_model_name=newest", ["final, best, last or step-<n>"]),
    ("train task=rm task.sft_experiment_dir=@/sft_run model.random_init=true", ["two beginnings: give one of them"]),
    ("train task=sft task.sft_experiment_dir=@/rm_run", ["a run of task=rm, which trains a reward model"]),
    # rewards and preferences
    ("train task=reward", ["task=reward belongs to `eval`"]),
    ("train task=rm task.loss_type=last", ["task.loss_type=last_token"]),
    ("train task=dpo task.loss_type=sigmoind", ["task.loss_type=sigmoid"]),
    ("train task=dpo task.beta=0", ["task.beta=0", "more than 0"]),
    ("train task=dpo task.label_smoothing=0.5", ["task.label_smoothing=0.5", "0.49 or less"]),
    (
        "train task=dpo task.loss_type=ipo task.label_smoothing=0.1",
        ["not read by task.loss_type=ipo", "sigmoid or robust"],
    ),
    ("train task=dpo task.simpo_gamma=0.5", ["not read by task.loss_type=sigmoid", "task.loss_type=simpo"]),
    ("doctor task=dpo task.loss_type=orpo task.simpo_gamma=2", ["not read by task.loss_type=orpo", "simpo"]),
    ("train task=dpo model.freeze_transformer=true", ["not read by task=dpo", "model.finetune_mode=LORA"]),
    ("train task=rm model.finetune_mode=LORA model.freeze_transformer=true", ["leaves no layer for adapters"]),
    # sweeps and recipes
    ("train -m task=sft model=opt,gpt3", ["model=gpt3", "model=gpt2"]),
    ("train -m task=sft seed=1,abc", ["seed=abc: a whole number is needed"]),
    ("train task=sft run_name='${oc.env:HOME}'", ["run_name=${oc.env:HOME}", "write the value"]),
    ("train task=sft run_name='${data.nothing}'", ["data.nothing"]),
    # the other commands
    ("inspect task=perplexity", ["task=perplexity", "eval task=perplexity"]),
    ("inspect split=tset", ["split=tset", "split=test"]),
    ("inspect num_examples=-1", ["num_examples=-1", "0 or more"]),
    ("inspect output_dir=/dev/null/x", ["output_dir=/dev/null/x", "is not a folder"]),
    ("inspect model=opt", ["HF_HUB_OFFLINE is set", "model=tiny"]),
    ("doctor split=test", ["no option split", "`inspect` has split"]),
    ("doctor task=sft fabric.devices=two", ["fabric.devices=two", "give a number"]),
    ("doctor experiment=nothing", ["experiment=nothing", "pretrain_tiny"]),
    ("fetch model=smolm2", ["model=smolm2", "model=smollm2"]),
    ("fetch model=auto", ["model.repo_name is missing"]),
    ("fetch model=opt", ["HF_HUB_OFFLINE is set", "connect"]),
    ("fetch task=sft", ["no option task", "`fetch --help`"]),
    ("fetch cache_dir=/dev/null/x", ["cache_dir=/dev/null/x", "is not a folder"]),
    ("list modles", ["modles", "`list models`"]),
    ("list --runs", ["`list` has no flag --runs", "no dashes"]),
    ("show model=optt", ["model=optt", "`show model=opt`"]),
    ("show optim.lrr", ["optim.lrr", "optim.lr"]),
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
