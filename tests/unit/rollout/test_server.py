"""Rollouts by servers: a small server samples with plain transformers from the weights that it is given."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.rollout import server as module
from sheeprlhf.rollout import weight_transfer
from sheeprlhf.rollout.engines import StopStrings
from sheeprlhf.rollout.rollout import sampling_uniforms
from sheeprlhf.rollout.sampler import Sampled
from sheeprlhf.rollout.server import RolloutServers
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import AutoModelConfig, LORAConfig
from sheeprlhf.structure.reward import AutoRewardConfig
from sheeprlhf.structure.rollout import GRPOConfig, VLLMRolloutConfig
from sheeprlhf.structure.run import AdamWConfig, FabricConfig, GenConfig, TrainConfig
from sheeprlhf.utils.errors import RolloutMismatchError, RolloutServerError
from tests.support.models import EOS, ModelFolder, make_model_folder
from tests.support.vllm_server import LOADING, FakeNCCL, VLLMServer, vllm_server

TEMPERATURE, GROUP, NEW = 0.7, 2, 5


class Client(SimpleNamespace):
    """A policy and what asks servers to sample from it."""

    policy: Policy
    servers: RolloutServers
    said: list[str]
    folder: Path

    def change(self, seed: int) -> None:
        """Change every trained weight."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in self.policy.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn_like(weight))

    def sample(self, *, again: bool = False) -> list[Sampled]:
        if not again:
            self.servers.write_weights()
        return self.servers.sample(PROMPTS, sampling_uniforms(0, 3, (len(PROMPTS), GROUP, NEW)))

    def trained(self, sampled: list[Sampled]) -> list[np.ndarray]:
        """Log-probabilities by the trainer's own forward pass."""
        found = []
        for prompt, one in zip(PROMPTS, sampled, strict=True):
            batch = collate_packed([Example(0, prompt, one.responses)], targets="response")
            with torch.no_grad():
                found.append(self.policy(batch, temperature=TEMPERATURE).target_N.numpy())
        return found

    def check(self, sampled: list[Sampled]) -> dict[str, float]:
        own = [np.concatenate(one.logprobs) for one in sampled]
        return self.servers.check({"sampled": own, "logprobs": self.trained(sampled)})


_RNG = np.random.default_rng(1)
PROMPTS = [_RNG.integers(0, 250, n).astype(np.int32) for n in (5, 1, 9, 3)]


def make_client(
    folder: Path, run_dir: Path, servers: list[VLLMServer], *stop: str, lora: bool = False, **options: Any
) -> Client:
    tuned = {"finetune_mode": "LORA", "lora_cfg": LORAConfig(rank=4, dropout=0.0)} if lora else {}
    model = AutoModelConfig(repo_name=str(folder), **tuned)
    cfg = TrainConfig(
        task=GRPOConfig(),
        model=model,
        data=LocalDataConfig(train_file="rows.jsonl"),
        fabric=FabricConfig(config_name="cpu", accelerator="cpu"),
        optim=AdamWConfig(),
        reward=AutoRewardConfig(),
        rollout=VLLMRolloutConfig(urls=[one.url for one in servers], **{"timeout": 60.0} | options),
        generation=GenConfig(max_new_tokens=NEW, temperature=TEMPERATURE, stop_strings=list(stop)),
    )
    tokenizer = load_tokenizer(model)
    torch.manual_seed(7)  # of new adapters
    with LOADING:
        policy = load_policy(model, tokenizer, longest=64, batching="auto")
    policy.exclude_undefined(tokenizer)
    run_dir.mkdir(exist_ok=True)
    said: list[str] = []
    own = RolloutServers(
        make_fabric(cfg.fabric),
        cfg,
        policy,
        tokenizer,
        StopStrings(stop, tokenizer),
        run_dir,
        said.append,
        stops=lambda: False,
    )
    return Client(policy=policy, servers=own, said=said, folder=run_dir / "rollout_weights", cfg=cfg)


def same(first: list[Sampled], second: list[Sampled]) -> bool:
    return all(
        np.array_equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one.responses, other.responses, strict=True)
    )


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.05)


@pytest.mark.parametrize("lora", [False, True])
def test_servers_sample_with_the_newest_weights(lora: bool, tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = model_folder()  # tied
    with vllm_server(folder) as first, vllm_server(folder) as second:
        client = make_client(folder, tmp_path / "run", [first, second], lora=lora)
        client.change(0)
        before = client.sample()
        assert client.check(before)["rollout/server_difference"] < 1e-5
        client.change(1)
        after = client.sample()
        assert client.check(after)["rollout/server_difference_max"] < 1e-5
        assert not same(before, after)
        for one in (first, second):  # both answer, and load the base of an adapter once
            assert one.requests.count("/inference/v1/generate") == len(PROMPTS)
            assert one.requests.count("/collective_rpc") == (1 if lora else 2)
            assert one.requests.count("/v1/load_lora_adapter") == (2 if lora else 0)
        with vllm_server(folder) as alone:
            third = make_client(folder, tmp_path / "other", [alone], lora=lora)
            third.policy.load_state_dict(client.policy.state_dict())
            assert same(third.sample(), after)  # whoever answers
        weights = load_file(client.folder / "policy" / "model.safetensors")
        assert "lm_head.weight" in weights
        assert client.policy.causal_lm().config.tie_word_embeddings
        client.servers.finish()
        assert not client.folder.exists()


def test_responses_end_as_the_sampler_ends_them(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = model_folder()
    with vllm_server(folder) as one:
        client = make_client(folder, tmp_path / "run", [one], "a", "</s>")
        with torch.no_grad():  # end tokens and "a" are likely
            client.policy.causal_lm().get_output_embeddings().weight[[EOS, 64]] += 0.4
        ends = set()
        for sampled in client.sample():
            for ids, logprobs, finished in zip(*sampled, strict=True):
                assert len(ids) == len(logprobs) <= NEW
                ended = [i for i, token in enumerate(ids) if token in (EOS, 64)]
                assert ended == ([len(ids) - 1] if finished else [])
                ends.add(int(ids[-1]) if finished else None)
        assert len(ends) > 1


def test_undefined_ids_are_never_sampled(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = model_folder()
    with vllm_server(folder) as one:
        client = make_client(folder, tmp_path / "run", [one])
        undefined = client.policy.undefined_U
        assert undefined is not None
        with torch.no_grad():
            client.policy.causal_lm().get_output_embeddings().weight[undefined] *= 50.0
        sampled = client.sample()
        assert not any(np.isin(ids, undefined.numpy()).any() for row in sampled for ids in row.responses)
        assert client.check(sampled)["rollout/server_difference"] < 1e-5


GENERATE = "/inference/v1/generate"


def fail(path: str, *numbers: int, how: int | str = 500) -> Callable[[VLLMServer], None]:
    def arm(server: VLLMServer) -> None:
        server.fault = lambda asked, number: how if asked == path and number in numbers else None

    return arm


def restart_at(path: str, at: int) -> Callable[[VLLMServer], None]:
    """Close a request and forget everything, as a server that is killed and started again."""

    def arm(server: VLLMServer) -> None:
        def fault(asked: str, number: int) -> str | None:
            if asked == path and number == at:
                server.restart()
                return "close"
            return None

        server.fault = fault

    return arm


def stale_at(at: int) -> Callable[[VLLMServer], None]:
    """Another trainer gives the server its weights in the middle."""

    def arm(server: VLLMServer) -> None:
        def fault(asked: str, number: int) -> None:
            if asked == GENERATE and number == at:
                server.restart()
                server.version = "of another trainer"

        server.fault = fault

    return arm


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Callable[[bool], list[Sampled]]:
    """A function (lora) -> responses by a server that does not fail."""
    made: dict[bool, list[Sampled]] = {}

    def make(lora: bool) -> list[Sampled]:
        if lora not in made:
            with vllm_server(model_folder()) as one:
                client = make_client(model_folder(), tmp_path_factory.mktemp("good"), [one], lora=lora)
                client.change(0)
                made[lora] = client.sample()
                assert not client.said
        return made[lora]

    return make


@pytest.mark.parametrize(
    ("lora", "arm"),
    [
        (False, fail(GENERATE, 1, 2, 3)),
        (False, fail("/collective_rpc", 1, how=503)),
        (False, fail("/update_weight_version", 1, how="close")),
        (False, restart_at(GENERATE, 2)),
        (False, restart_at("/pause", 1)),
        (False, stale_at(3)),
        (True, restart_at(GENERATE, 2)),
        (True, stale_at(3)),
    ],
    ids=["500", "load", "version", "restart", "restart_in_sync", "stale", "lora_restart", "lora_stale"],
)
def test_a_failing_server_changes_nothing(
    lora: bool,
    arm: Callable[[VLLMServer], None],
    tmp_path: Path,
    model_folder: ModelFolder,
    expected: Callable[[bool], list[Sampled]],
) -> None:
    good = expected(lora)
    with vllm_server(model_folder()) as one:
        client = make_client(model_folder(), tmp_path / "run", [one], lora=lora)
        client.change(0)
        arm(one)
        found = client.sample()
        assert client.check(found)["rollout/server_difference"] < 1e-5
        assert client.said
        assert same(found, good)


def test_a_hanging_server_leaves_its_prompts_to_the_others(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = model_folder()
    with vllm_server(folder) as good, vllm_server(folder) as bad:
        client = make_client(folder, tmp_path / "run", [bad, good])
        first = client.sample()
        client.servers._options = replace(client.cfg.rollout, timeout=2.0)
        fail(GENERATE, *range(99), how="hang")(bad)
        assert same(client.sample(again=True), first)
        assert good.requests.count(GENERATE) == len(PROMPTS) * 3 // 2


def test_the_next_prompt_goes_to_the_server_that_is_free(
    tmp_path: Path,
    model_folder: ModelFolder,
    expected: Callable[[bool], list[Sampled]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slow server's only answer comes when the fast one has been asked for all other prompts."""
    monkeypatch.setattr(module, "_IN_FLIGHT", 1)
    folder, good = model_folder(), expected(False)
    with vllm_server(folder) as fast, vllm_server(folder) as slow:

        def wait_for_the_others(path: str, number: int) -> None:
            until = time.monotonic() + 20
            while path == GENERATE and fast.requests.count(GENERATE) < len(PROMPTS) - 1 and time.monotonic() < until:
                time.sleep(0.01)

        slow.fault = wait_for_the_others
        client = make_client(folder, tmp_path / "run", [slow, fast])
        client.change(0)
        assert same(client.sample(), good)
        assert [one.requests.count(GENERATE) for one in (slow, fast)] == [1, len(PROMPTS) - 1]


def test_a_slow_server_is_reported(tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answers two prompts: the first server in a second each, then the second in ten seconds each."""
    folder, clock, own = model_folder(), [0.0], RolloutServers._ask
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with vllm_server(folder) as fast, vllm_server(folder) as slow:
        client, answered = make_client(folder, tmp_path / "run", [fast, slow]), Counter[str]()

        async def ask(self: RolloutServers, http: Any, url: str, *given: Any) -> Sampled:
            found = await own(self, http, url, *given)
            while url == slow.url and answered[fast.url] < len(PROMPTS) // 2:
                await asyncio.sleep(0.01)
            for _ in range(20 * (url == slow.url)):  # the first server is done, and its time taken
                await asyncio.sleep(0)
            clock[0] += 10.0 if url == slow.url else 1.0
            answered[url] += 1
            return found

        monkeypatch.setattr(RolloutServers, "_ask", ask)
        client.servers.write_weights()
        uniforms = sampling_uniforms(0, 3, (len(PROMPTS), GROUP, NEW))
        for number in range(3):
            assert not client.said
            answered.clear()
            sampled = client.servers.sample(PROMPTS, uniforms, number)
            tokens = [sum(len(ids) for one in sampled[at : at + 2] for ids in one.responses) for at in (0, 2)]
            name = "rollout/server_tokens_per_second"
            assert client.servers.speeds == pytest.approx({f"{name}/1": tokens[0] / 2, f"{name}/2": tokens[1] / 22})
        assert len(client.said) == 1 and slow.url in client.said[0] and fast.url not in client.said[0]
        answered.clear()
        client.servers.sample(PROMPTS, uniforms)
        assert client.servers.speeds == {}  # of a validation


@pytest.mark.parametrize(
    ("how", "options", "asked"),
    [("close", {"timeout": 2.0}, 2), ("hang", {"timeout": 0.5}, 1), (403, {}, 1)],
    ids=["down", "hang", "forbidden"],
)
def test_no_server_answers(
    how: int | str,
    options: dict[str, Any],
    asked: int,
    tmp_path: Path,
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock goes on by the pauses, which take no time here."""
    folder, skipped, sleep = model_folder(), [0.0], asyncio.sleep

    async def skip(seconds: float) -> None:
        skipped.append(seconds)
        await sleep(0)

    monkeypatch.setattr(module.asyncio, "sleep", skip)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(skipped)))
    with vllm_server(folder) as one:
        client = make_client(folder, tmp_path / "run", [one], **options)
        fail("/weight_info", *range(999), how=how)(one)
        with pytest.raises(RolloutServerError, match=one.url.split("/")[-1] if how == 403 else "rollout.timeout="):
            client.sample()
        assert len(one.requests) >= asked
        assert (client.folder / "policy" / "config.json").exists()


@pytest.mark.parametrize("attribute", ["keeps_head", "raw_logprobs"])
def test_other_probabilities_stop_the_run(attribute: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = model_folder()
    with vllm_server(folder) as one:
        setattr(one, attribute, True)
        client = make_client(folder, tmp_path / "run", [one])
        client.change(0)
        sampled = client.sample()
        with pytest.raises(RolloutMismatchError, match=rf"{one.url} .*rollout.tolerance=0.001") as error:
            client.check(sampled)
        assert error.value.exit_code == 2
        loose = replace(client.cfg, rollout=replace(client.cfg.rollout, tolerance=99.0))
        client.servers._options = loose.rollout
        apart = [
            np.abs(np.concatenate(row.logprobs) - trained)
            for row, trained in zip(sampled, client.trained(sampled), strict=True)
        ]
        assert client.check(sampled) == {
            "rollout/server_difference": pytest.approx(max(one.mean() for one in apart)),
            "rollout/server_difference_max": pytest.approx(max(one.max() for one in apart)),
        }


def test_weights_by_nccl(tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers receive every weight, tied ones too; one that is started again joins a new group."""
    folder, nccl = model_folder(), FakeNCCL()
    monkeypatch.setattr(weight_transfer, "nccl", nccl)
    monkeypatch.setattr(weight_transfer.torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(weight_transfer.torch.cuda, "synchronize", lambda: None)
    with vllm_server(folder) as first, vllm_server(folder) as second:
        first.nccl = second.nccl = nccl
        client = make_client(folder, tmp_path / "run", [first, second], sync="nccl")
        for seed in (0, 1):
            client.change(seed)
            assert client.check(client.sample())["rollout/server_difference_max"] < 1e-5
        assert len(nccl.groups) == 2
        second.restart()
        fail("/update_weights", 3, how=503)(first)
        for seed in (2, 3):  # the first server's prompts go to the second one meanwhile
            client.change(seed)
            assert client.check(client.sample())["rollout/server_difference_max"] < 1e-5
        assert len(nccl.groups) == 4  # another for each of them
        assert "/collective_rpc" not in first.requests + second.requests
        first.nccl = second.nccl = None
        with pytest.raises(RolloutServerError, match="--weight-transfer-config"):
            client.sample()


def test_a_tied_server_is_refused(tmp_path: Path, model_folder: ModelFolder) -> None:
    with vllm_server(model_folder()) as one:
        one.tied = True
        with pytest.raises(RolloutMismatchError, match="rollout_weights/policy"):
            make_client(model_folder(), tmp_path / "run", [one]).sample()
        assert GENERATE not in one.requests
        client = make_client(model_folder(), tmp_path / "lora", [one], lora=True)  # whose base does not change
        assert client.check(client.sample())["rollout/server_difference"] < 1e-5


def test_a_server_that_cannot_do_what_is_asked(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = model_folder()
    with vllm_server(make_model_folder(tmp_path / "wide", "gpt2")) as one:
        client = make_client(folder, tmp_path / "run", [one])
        one.reload = lambda folder: (_ for _ in ()).throw(ValueError("shapes differ"))  # type: ignore[method-assign]
        with pytest.raises(RolloutServerError, match=r"shapes differ.*rollout.sync_dir"):
            client.sample()
        assert one.requests.count("/collective_rpc") == 3
    with vllm_server(folder) as one:
        one.longest = 8
        with pytest.raises(RolloutServerError, match="--max-model-len"):
            make_client(folder, tmp_path / "run", [one]).sample()
        one.generate = lambda body: {"choices": [{"index": 0}]}  # type: ignore[method-assign]
        with pytest.raises(RolloutServerError, match="malformed"):
            make_client(folder, tmp_path / "run", [one]).sample()
