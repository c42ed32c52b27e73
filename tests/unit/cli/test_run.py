"""What a task receives, and what becomes of its result: the task here is a stub that records its arguments."""

import json
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from sheeprlhf.config.registry import config_to_dict
from sheeprlhf.launch import Finished, check_inputs_exist
from sheeprlhf.structure.evaluation import PerplexityConfig
from sheeprlhf.structure.task import SFTConfig
from sheeprlhf.utils.errors import ConfigError, Interrupted, MissingRanksError, NonFiniteError
from tests.support.runs import exit_code


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The arguments of each call of a task; the working directory is empty."""
    recorded = []
    stub = types.ModuleType("stub_task")
    stub.train = lambda fabric, config, run_dir: recorded.append((config, run_dir, list(sys.argv)))
    stub.evaluate = lambda fabric, config: recorded.append((config, None, list(sys.argv)))
    monkeypatch.setitem(sys.modules, "stub_task", stub)
    monkeypatch.setattr(SFTConfig, "entry_point", "stub_task:train")
    monkeypatch.setattr(PerplexityConfig, "entry_point", "stub_task:evaluate")
    for check in ("check_inputs_exist", "_check_weights"):  # the stub needs no model of the hub
        monkeypatch.setattr(f"sheeprlhf.launch.{check}", lambda config: None)
    monkeypatch.chdir(tmp_path)
    return recorded


def fail_with(error):
    def train(fabric, config, run_dir):
        raise error

    sys.modules["stub_task"].train = train


def test_a_task_gets_a_read_only_typed_configuration_and_a_private_directory(calls, tmp_path):
    run(["train", "task=sft", "model=opt", "model.finetune_mode=lora", "optim.lr=3e-4", "seed=7"])
    [(config, run_dir, argv)] = calls
    assert type(config.task) is SFTConfig
    assert config.model.finetune_mode == "LORA"
    assert config.peak_lr() == 3e-4
    with pytest.raises(AttributeError, match="read-only"):
        config.model.lora_cfg.rank = 4
    assert run_dir.is_absolute()
    assert run_dir.relative_to(tmp_path).parts[:5] == ("logs", "runs", "docstrings", "opt", "sft")
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert argv[1:] == ["train", "task=sft", "model=opt", "model.finetune_mode=lora", "optim.lr=3e-4", "seed=7"]
    assert not list(tmp_path.rglob("*.yaml"))
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}


def test_a_recipe_overrides_groups_and_the_command_line_overrides_it(calls):
    run(["train", "experiment=sft_smollm2_lora", "model.lora_cfg.rank=4", "data.max_length=100"])
    [(config, _, _)] = calls
    assert (config.model.config_name, config.model.finetune_mode) == ("smollm2", "LORA")
    assert (config.model.lora_cfg.rank, config.data.max_length) == (4, 100)
    assert config.experiment == "sft_smollm2_lora"


def test_a_dry_run_is_two_steps_of_the_same_model(calls):
    run(["train", "task=sft", "dry_run=true", "model=phi"])
    [(config, _, _)] = calls
    assert config.task.max_num_steps == 2
    assert config.data.num_samples == 64
    assert config.generation.max_new_tokens == 8
    calls.clear()
    run(["train", "task=sft", "model=phi"])
    assert config_to_dict(calls[0][0].model) == config_to_dict(config.model)


def test_a_sweep_makes_one_run_of_each_and_leaves_no_file_of_hydra(calls, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))  # if it imports torch first
    run(["train", "-m", "task=sft", "seed=1,2", "run_name=try"])
    assert [(config.seed, config.run_name) for config, _, _ in calls] == [(1, "try_0"), (2, "try_1")]
    assert [run_dir.name for _, run_dir, _ in calls] == ["try_0", "try_1"]
    assert "seed=2" in calls[1][2]
    assert "--multirun" not in calls[1][2]
    assert not list(tmp_path.rglob("*.yaml"))
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}


def test_a_failed_job_does_not_end_the_sweep_but_its_exit_code_counts(calls, capsys):
    good = sys.modules["stub_task"].train

    def train(fabric, config, run_dir):
        if config.seed == 1:
            raise NonFiniteError("loss of rows 3, 4 is nan")
        good(fabric, config, run_dir)

    sys.modules["stub_task"].train = train
    assert exit_code("train -m task=sft seed=1,2") == 1
    assert [config.seed for config, _, _ in calls] == [2]
    assert "loss of rows 3, 4 is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a=1 is wrong; give a=2", "b=3 too"), 2, "  - b=3 too"),
        (NonFiniteError("rows 3"), 1, "rows 3"),
        (Interrupted(15), 143, "stopped by signal 15"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (ZeroDivisionError("division of sk-abcdefghijklmnopqrstuvwxyz0123456789"), 1, "ZeroDivisionError"),
    ],
)
def test_an_error_is_a_message_and_an_exit_code(calls, capsys, error, code, message):
    fail_with(error)
    assert exit_code("train task=sft") == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert "sk-abc" not in printed


def test_ranks_that_never_met_leave_no_run_directory(calls, capsys, tmp_path):
    fail_with(MissingRanksError("rank 1 of 2 did not start"))
    assert exit_code("train task=sft") == 1
    assert "rank 1 of 2" in capsys.readouterr().err
    assert list(tmp_path.glob("logs/runs/*")) == []


def test_another_machine_says_that_it_is_one(calls, capsys, monkeypatch):
    monkeypatch.setattr("sheeprlhf.cli._SECONDS_FOR_RANK_ZERO", 0)
    for name, value in (("NODE_RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert exit_code("train task=sft fabric.num_nodes=2 resume_from=nowhere") == 2
    assert socket.gethostname() in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["0", "1"])
def test_restarts_by_torchrun_need_a_variable_and_resume(calls, capsys, monkeypatch, variable):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", variable)
    assert exit_code(f"train task=sft resume={variable == '1'} hydra.run.dir=not_yet_there") == 0
    printed = capsys.readouterr().err
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in printed) == ("resume=true" in printed) == (variable == "0")
    assert len(calls) == 1


def test_what_was_interrupted_in_its_making_does_not_complain(calls, monkeypatch):
    """As a progress bar of tqdm does, which is closed when it goes and has no place yet."""

    class Half:
        def __del__(self):
            raise AttributeError("no place yet")

    def train(fabric, config, run_dir):
        half = Half()
        raise KeyboardInterrupt(type(half).__name__)

    sys.modules["stub_task"].train = train
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    assert exit_code("train task=sft") == 130
    assert heard == []
    half = Half()
    del half
    assert len(heard) == 1  # anywhere else one is heard


def test_an_unexpected_error_leaves_its_traceback_in_the_run_directory(calls, capsys, tmp_path):
    fail_with(ZeroDivisionError("sk-abcdefghijklmnopqrstuvwxyz0123456789"))
    exit_code("train task=sft")
    [log] = tmp_path.rglob("error.log")
    assert str(log) in capsys.readouterr().err
    assert "in train" in log.read_text()
    assert "sk-abc" not in log.read_text()


def test_a_missing_package_names_this_python(calls, capsys):
    fail_with(ModuleNotFoundError("No module named 'peft'"))
    assert exit_code("train task=sft") == 1
    printed = capsys.readouterr().err
    assert "peft" in printed and sys.executable in printed


def test_a_signal_ends_the_whole_sweep(calls):
    seeds = []

    def train(fabric, config, run_dir):
        seeds.append(config.seed)
        raise Interrupted(2)

    sys.modules["stub_task"].train = train
    assert exit_code("train -m task=sft seed=1,2,3") == 130
    assert seeds == [1]


def test_everything_random_is_seeded(calls):
    import random

    import numpy as np
    import torch

    drawn = []

    def train(fabric, config, run_dir):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))

    sys.modules["stub_task"].train = train
    for seed in (1, 1, 2):
        run(["train", "task=sft", f"seed={seed}"])
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))


def saved_run(tmp_path, calls, *words) -> Path:
    """A run directory with the config.yaml that a training run writes."""
    import yaml

    run(["train", "task=sft", *words])
    config, run_dir, _ = calls.pop()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    (run_dir / "final").mkdir()
    return run_dir


def test_eval_takes_model_and_data_from_the_run(calls, tmp_path):
    run_dir = saved_run(tmp_path, calls, "model=opt", "model.finetune_mode=LORA", "data.max_length=100")
    run(["eval", "task=perplexity", f"experiment_dir={run_dir}", "data.num_samples=5"])
    [(config, _, _)] = calls
    assert config.model.config_name == "opt"
    assert config.model.finetune_mode == "LORA"
    assert type(config.data).__name__ == "DocstringsConfig"
    assert (config.data.max_length, config.data.num_samples) == (100, 5)


def test_a_saved_run_cannot_switch_on_remote_code(calls, tmp_path):
    commit = "0" * 40
    trust = ["model.library_cfg.trust_remote_code=true", f"model.library_cfg.revision={commit}"]
    run_dir = saved_run(tmp_path, calls, "model=opt", *trust)
    run(["eval", "task=perplexity", f"experiment_dir={run_dir}"])
    assert calls.pop()[0].model.library_cfg.trust_remote_code is False
    run(["eval", "task=perplexity", f"experiment_dir={run_dir}", trust[0]])
    assert calls.pop()[0].model.library_cfg.trust_remote_code is True


@pytest.mark.parametrize("verb", ["train task=sft", "inspect"])
def test_remote_code_is_announced_before_anything_loads(monkeypatch, capsys, verb):
    def load(verb, args, job, **_):
        check_inputs_exist(job.config)
        return Finished(0)

    monkeypatch.setattr("sheeprlhf.launch.launch", load)
    monkeypatch.setattr("sheeprlhf.launch.locate", lambda model: types.SimpleNamespace(note="", no_hub=False))
    trust = f"model.library_cfg.trust_remote_code=true model.library_cfg.revision={'0' * 40}"
    assert exit_code(f"{verb} model=auto model.repo_name=owner/name {trust}") == 0
    assert f"owner/name at {'0' * 40}" in capsys.readouterr().out


ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "datasets", "lightning", "peft", "numpy", "pandas", "pyarrow", "gradio")
QUICK = {  # exit codes
    "--help": 0,
    "train --help": 0,
    "list runs": 0,
    "show model=opt lr train": 0,
    "train task=sft --cfg job": 0,
    "train task=sft fabric=auto_cuda optim.lr=abc": 2,
    "chat zzzz": 2,
    "export tiny": 2,
    "demo zzzz --port 1x": 2,
}
PROGRAM = f"""
import json, sys, time
def run_line(line):
    from sheeprlhf.cli import run
    began, code = time.process_time(), 0
    try:
        run(line.split())
    except SystemExit as stop:
        code = stop.code or 0
    return code, time.process_time() - began, [name for name in {HEAVY} if name in sys.modules]
print(json.dumps({{line: run_line(line) for line in {[*QUICK]}}}), file=sys.stderr)
"""


def test_help_and_errors_are_quick_and_light(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )
    for line, (code, seconds, heavy) in json.loads(done.stderr.splitlines()[-1]).items():
        assert (code, heavy) == (QUICK[line], []), line
        assert seconds < 3, line  # of CPU: about 0.4 with the imports of the first
    assert list(tmp_path.iterdir()) == []


WITHOUT_HYDRA = (
    *("--help", "train --help", "eval task=rouge --help", "doctor model=opt --help", "pipeline --help"),
    *("trian task=sft", "train --epochs 3"),
)


def test_help_and_wrong_commands_import_no_hydra(tmp_path):
    program = PROGRAM.replace(repr([*QUICK]), repr([*WITHOUT_HYDRA])).replace(repr(HEAVY), "('hydra', 'omegaconf')")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    answers = json.loads(done.stderr.splitlines()[-1])
    assert {line: (code, heavy) for line, (code, _, heavy) in answers.items()} == {
        line: (0 if line.endswith("--help") else 2, []) for line in WITHOUT_HYDRA
    }


COUNT_CALLS = """
import cProfile, sys
from contextlib import suppress
profile = cProfile.Profile()
with profile, suppress(SystemExit):
    from sheeprlhf.cli import run
    run(sys.argv[1:])
print("calls", sum(entry.callcount for entry in profile.getstats()))
"""


@pytest.mark.parametrize(
    ("line", "limit"),
    [
        ("train task=sft optim.lrx=3", 1_400_000),  # about 1,050,000; 1,860,000 with the configurations of all choices
        ("train --help", 900_000),  # about 630,000; 1,440,000 with Hydra
        ("pipeline --help", 450_000),  # about 280,000; 860,000 with Hydra
    ],
)
def test_help_and_errors_call_few_functions(line, limit):
    command = [sys.executable, "-c", COUNT_CALLS, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout.rpartition("calls ")[2]) < limit


@pytest.mark.parametrize("start", [["sheeprlhf.py"], ["-m", "sheeprlhf"]])
def test_script_and_module_start_alike(start):
    done = subprocess.run([sys.executable, *start], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "Commands:" in done.stdout
    assert "train" in done.stdout


def test_the_console_script_is_the_same_function():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["sheeprlhf"] == "sheeprlhf.cli:run"
