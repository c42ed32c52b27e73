"""Wrong command lines: one short message that names the key and the fix, exit code 2, nothing started or written."""

from pathlib import Path

import pytest

from sheeprlhf.cli import run
from sheeprlhf.structure import machine

FORTY_DIGITS = "0123456789abcdef0123456789abcdef01234567"

# words of the command line; what its message must contain
BAD = [
    ("trian task=sft", ["trian", "`train`"]),
    ("task=sft", ["task=sft is not a command", "`train`"]),
    ("train", ["task is missing", "sft"]),
    ("eval", ["task is missing", "perplexity", "experiment_dir"]),
    ("train --hlep task=sft", ["--hlep", "--help"]),
    ("train task=sft --config-dir", ["--config-dir needs a value"]),
    ("train task=sft --config-dir=/nowhere/at/all", ["/nowhere/at/all", "folder"]),
    ("train task=sft --config-path=x", ["--config-path", "--config-dir"]),
    ("train --experimental-rerun job.pickle", ["--experimental-rerun", "unpickle"]),
    ("train task=sf", ["task=sf", "task=sft"]),
    ("train task=perplexity", ["task=perplexity", "eval task=perplexity"]),
    ("eval task=sft", ["task=sft", "train task=sft"]),
    ("train task=sft model=optt", ["model=optt", "model=opt"]),
    ("train task=sft model=OPT", ["model=OPT", "model=opt"]),
    ("train task=sft data=summarisation", ["data=summarization"]),
    ("train task=sft model=null", ["model=null", "tiny"]),
    ("train task=sft +model=opt", ["+model=opt", "write model=opt"]),
    ("train task=sft ~optim", ["~optim", "cannot be removed"]),
    ("train task=sft experiment=pretrain_tny", ["experiment=pretrain_tiny"]),
    ("train sft", ["sft is not key=value", "task=sft"]),
    ("train task=sft modle=opt", ["no option modle", "model"]),
    ("train task=sft model.lora_cfg.ranc=4", ["model.lora_cfg.rank"]),
    ("train task=sft lr=1e-4", ["no option lr", "optim.lr"]),
    ("train task=sft epoch=3", ["task.epochs"]),
    ("train task=sft +task.beta=1", ["no option task.beta"]),
    ("train task=sft +seed=1", ["+seed=1", "without the +"]),
    ("train task=sft ~seed", ["~seed", "removed"]),
    ("train task=sft data.train_file=x.csv", ["data.train_file", "data=local"]),
    ("train task=sft optim.lr=abc", ["optim.lr=abc: a number is needed", "for example optim.lr=1e-5"]),
    ("train task=sft task.epochs=1.5", ["task.epochs=1.5: a whole number is needed"]),
    ("train task=sft seed=true", ["seed=true: a whole number is needed"]),
    ("train task=sft dry_run=maybe", ["true or false is needed"]),
    ("train task=sft run_name=null", ["run_name=null: a value is needed"]),
    ("train task=sft optim.betas=3", ["a list of 2 numbers is needed"]),
    ("train task=sft optim.betas=[0.9]", ["two numbers"]),
    ("train task=sft fabric.devices=[0,1]", ["quote it", "fabric.devices='0,1'"]),
    ("train task=sft seed=1,2", ["seed=1,2", "-m"]),
    ("train task=sft optim.lr=-1", ["optim.lr=-1", "0 or more"]),
    ("train task=sft optim.lr=nan", ["optim.lr=nan", "finite"]),
    ("train task=sft task.token_budget=0", ["task.token_budget=0", "1 tokens or more"]),
    ("train task=sft generation.top_p=1.5", ["generation.top_p=1.5", "1 or less"]),
    ("train task=sft generation.temperature=0", ["more than 0"]),
    ("train task=sft model.finetune_mode=lorra", ["model.finetune_mode=LORA"]),
    ("train task=sft data=local", ["data.train_file is missing"]),
    ("train task=sft data=local data.train_file=/nowhere.jsonl", ["/nowhere.jsonl is not a file"]),
    ("train task=sft data=local data.train_file=rows.pickle", ["rows.pickle", ".jsonl"]),
    ("train task=sft model=auto", ["model.repo_name is missing"]),
    ("train task=sft data.max_prompt_length=128", ["data.max_prompt_length=128", "data.max_length=128", "=96"]),
    ("train task=sft data.validation_split=0.5 data.test_split=0.5", ["below 1"]),
    ("train task=sft data.reward_model_split=1", ["data.reward_model_split=1", "0.5"]),
    ("train task=sft task.micro_batch_size=0", ["task.micro_batch_size=0", "1"]),
    ("train task=sft model.lora_cfg.targets=[]", ["model.lora_cfg.targets", "all-linear"]),
    ("train task=sft model.finetune_mode=LORA model.lora_cfg=null", ["needs model.lora_cfg"]),
    ("train task=sft model.lora_cfg=null model.lora_cfg.rank=4", ["model.lora_cfg is null"]),
    ("train task=sft model.finetune_mode=LORA model.freeze_transformer=true", ["model.freeze_transformer=true"]),
    ("train task=sft model.finetune_mode=LORA model.random_init=true", ["model.random_init=true"]),
    ("train task=sft model.library_cfg.trust_remote_code=true", ["runs Python code", "revision=<40-digit commit>"]),
    ("train task=sft generation.num_beams=2 generation.do_sample=true", ["generation.num_beams=1"]),
    ("train task=sft optim=sgd optim.nesterov=true", ["optim.momentum=0.9"]),
    ("train task=sft fabric.precision=16-true", ["fabric.precision=16-true", "bf16-mixed"]),
    ("train task=sft fabric.devices=two", ["fabric.devices=two", "auto"]),
    ("train task=sft fabric.strategy=fsdp2", ["fabric.strategy=ddp"]),
    ("train task=sft fabric=auto_cuda", ["fabric=cpu"]),
    ("train task=sft root_dir=/dev/null/runs", ["root_dir=/dev/null/runs", "is a file"]),
    ("train task=sft resume=true resume_from=/tmp", ["resume=true and resume_from"]),
    ("train task=sft resume_from=/nowhere", ["resume_from=/nowhere"]),
    ("train task=sft run_name=a/b", ["run_name=a/b"]),
    ("train -m task=sft model=opt,gpt3", ["model=gpt3", "model=gpt2"]),
    ("train task=sft run_name='${oc.env:HOME}'", ["run_name=${oc.env:HOME}", "write the value"]),
    ("train task=sft run_name='${data.nothing}'", ["data.nothing"]),
    ("eval task=perplexity", ["experiment_dir", "model=", "data="]),
    ("eval task=perplexity experiment_dir=/nowhere", ["experiment_dir=/nowhere is not a directory"]),
    ("eval task=perplexity model=tiny data.max_length=64", ["data.max_length cannot be set", "data=<name>"]),
    ("eval task=perplexity model=tiny data=docstrings task.model_name=newest", ["final, best, last or step-<n>"]),
    ("eval task=perplexity model=tiny data=local data.train_file=x.csv task.data_split=reward", ["reward", "empty"]),
    ("eval task=perplexity experiment=pretrain_tiny", ["no option experiment", "experiment_dir"]),
]


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line for line, _ in BAD])
def test_a_bad_command_line_says_what_to_do(line, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "cuda_device_count", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        run(line.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    for part in expected:
        assert part in printed.err
    assert "Traceback" not in printed.err
    problems = printed.err.count("\n  - ")
    assert 1 <= problems <= 3
    assert len(printed.err.splitlines()) <= 1 + 5 * problems
    assert list(tmp_path.iterdir()) == []  # no outputs/, no .hydra/, no run directory


@pytest.mark.parametrize(
    ("word", "secret"),
    [
        ("hf_token=verysecretvalue", "verysecretvalue"),
        ("+model.api_key=verysecretvalue", "verysecretvalue"),
        ("data.password=verysecretvalue", "verysecretvalue"),
        ("hydra.job.env_set.HF_TOKEN=verysecretvalue", "verysecretvalue"),
        ("run_name=hf_abcdefghijklmnopqrstuv", "hf_abcdefghijklmnopqrstuv"),
        ("data.dataset_name='https://me:verysecretvalue@host/data'", "verysecretvalue"),
        ("verysecretvalue_token=a b", "a b"),
    ],
)
def test_a_secret_on_the_command_line_is_refused_by_name_and_never_repeated(
    word, secret, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(["train", "task=sft", word])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert word.split("=")[0].lstrip("+") in printed.err
    assert "credentials never go on the command line" in printed.err
    assert secret not in printed.err + printed.out
    assert list(tmp_path.iterdir()) == []


def test_options_with_token_in_their_name_are_no_secrets(capsys):
    run(["train", "task=sft", "task.token_budget=999", "generation.max_new_tokens=7", "--cfg", "job"])
    assert "token_budget: 999" in capsys.readouterr().out


def test_all_problems_are_said_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(["train", "task=sft", "modle=opt", "optim.lr=abc", "generation.top_k=-1", "data=local"])
    message = capsys.readouterr().err
    for key in ("modle", "optim.lr=abc", "generation.top_k=-1", "data.train_file is missing"):
        assert key in message
    assert message.count("\n  - ") == 4


def test_a_valid_trust_in_remote_code_is_no_problem(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    trust = f"model.library_cfg.trust_remote_code=true model.library_cfg.revision={FORTY_DIGITS}"
    run(["train", "task=sft", *trust.split(), "--cfg", "job"])
    assert FORTY_DIGITS in capsys.readouterr().out


def test_a_cuda_machine_is_asked_for_the_number_of_devices(monkeypatch):
    monkeypatch.setattr(machine, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "2.13.0")
    assert machine.cuda_problem(1) is None
    assert "fabric.devices=1" in (machine.cuda_problem(2) or "")
    assert "fabric.devices=1" in (machine.cuda_problem([0, 1]) or "")
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert "CPU build" in (machine.cuda_problem(1) or "")


def test_an_unwritable_folder_is_found_before_anything_starts(monkeypatch, tmp_path):
    from sheeprlhf.structure import validate

    monkeypatch.setattr(validate.os, "access", lambda path, mode: False)
    assert "does not permit it" in next(validate._folder_problems("root_dir", str(Path(tmp_path) / "runs")))
