"""Rollouts by servers of vLLM: the policy's weights go to them, sampled responses come back, and both are verified.

A server is an unmodified `vllm serve` in development mode. Before a rollout, rank zero writes the weights, or the
adapter alone, into a folder that the servers read, and gives the weights a version. Every response names the version
that it was sampled with. A server that was restarted, or got other weights, has another version: it gets the weights
again and is asked again. Prompts of a server that fails go to the others; rank zero waits, with growing pauses, until
one answers.

A response is a function of the weights, the prompt and its seed, up to rounding; which server answers has no influence.
Every rollout is written to the run directory as soon as it is sampled, and removed when a checkpoint comes after its
updates: a resumed run learns from the same responses.
"""

import asyncio
import hashlib
import re
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from peft import PeftModel
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy
from sheeprlhf.engine.checkpoint import read_tensors
from sheeprlhf.engine.manifest import remove_folder, verify_manifest, write_folder, write_manifest
from sheeprlhf.engine.shard import whole
from sheeprlhf.model.adapter import POLICY
from sheeprlhf.rollout.engines import StopStrings, cut_at_end, first_seed
from sheeprlhf.rollout.sampler import Sampled, sampled_by_prompt
from sheeprlhf.rollout.server_speed import SpeedWatch
from sheeprlhf.rollout.vllm_api import SECONDS_OF_CHECK, START, UnavailableError, call, served_model
from sheeprlhf.rollout.weight_transfer import WeightTransfer, update_info
from sheeprlhf.structure.rollout import BestOfNConfig, VLLMRolloutConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import (
    CheckpointError,
    ModelError,
    Notify,
    RolloutMismatchError,
    RolloutServerError,
    UnsafePathError,
)
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.http import client, describe
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.output import (
    discard,
    make_folder,
    make_folders,
    remove_marked,
    sweep_scratch,
    writing_errors,
    written_folder,
)
from sheeprlhf.utils.processes import in_thread, run_coroutine

ADAPTER = "sheeprlhf-policy"  # name of the policy's adapter on the servers
SPEED = "rollout/server_tokens_per_second"  # a metric for each server, with its number in rollout.urls from 1
_IN_FLIGHT = 64  # most prompts that a server answers at a time
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 5.0  # seconds before servers are asked again, doubled each time
_MAX_FAILED_LOADS = 3  # a server that cannot load the weights so many times has another model
_NO_BIAS = -100.0  # the lowest that vLLM takes: a probability below 1e-43
_BYTES_PER_TOKEN = 256  # of an answer

_KEPT = "server_rollouts"  # in the run directory
_KEPT_ROLLOUT = re.compile(r"rollout-(\d{1,12})")
_KEPT_FILE = "rollout.safetensors"
_PER_RUN = 1 << 32  # more than a run has rollouts; other ones of rollout i have the numbers i + j * _PER_RUN

_TRANSFER_OPTION = """the option --weight-transfer-config '{"backend": "nccl"}'"""


class _Answer(NamedTuple):
    """A rollout as the servers gave it."""

    sampled: list[Sampled]  # of each prompt
    urls: list[str]  # of each prompt: the server that gave the responses
    speeds: dict[str, float]  # tokens per second of each server


class _Pending(NamedTuple):
    """A rollout that is sampled in the background, or was sampled and has not been used."""

    weights_of: int  # the rollout before whose updates the weights were written that it is sampled with
    key: str  # digest of its prompts and seeds
    answer: Future[_Answer]  # used on rank zero only


class RolloutServers:
    """All ranks make it and call its methods; rank zero alone writes the weights and asks the servers.

    Args:
        fabric: where the run runs.
        cfg: has `rollout=vllm`.
        policy: its weights are sampled with.
        tokenizer: of the policy.
        stop: the stop strings.
        run_dir: names the folder of the weights, or has it; has the rollouts that are kept.
        say: prints a line for the user.

    Attributes:
        staleness: rollouts that were learnt from since the weights of the newest one were written.
        was_pending: whether the newest rollout was sampled before it was asked for.
        speeds: metrics of the newest rollout, the tokens per second of each server that did not fail; of a validation
            none.
    """

    def __init__(
        self,
        fabric: Fabric,
        cfg: TrainConfig,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        stop: StopStrings,
        run_dir: Path,
        say: Notify,
        stops: Callable[[], bool],
    ) -> None:
        """Prepare without asking a server; `stops` returns True as soon as a signal to stop has reached this rank."""
        assert isinstance(cfg.rollout, VLLMRolloutConfig)
        self._fabric, self._cfg, self._options, self._policy, self._say = fabric, cfg, cfg.rollout, policy, say
        self._tokenizer, self._stop, self._end_ids, self._stops = tokenizer, stop, end_token_ids(tokenizer), stops
        folder = self._options.sync_dir
        name = f"rollout-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]}"
        self._folder = run_dir.resolve() / "rollout_weights" if folder is None else expand_home(folder).resolve() / name
        self._urls = [url.rstrip("/") for url in self._options.urls]
        self._run, self._number = secrets.token_hex(4), 0
        self._failed_loads = dict.fromkeys(self._urls, 0)
        self._answered: list[str] = []  # the server of each prompt of the newest rollout
        self._problem: ModelError | None = None  # in writing the weights, on rank zero
        self._transfers: dict[str, WeightTransfer] = {}  # with rollout.sync=nccl, of servers that have joined a group
        self._state: dict[str, Any] = {}  # the weights that they get
        self._pending: dict[int, _Pending] = {}  # by the number of the rollout
        self._saved_before = 0  # rollout that follows the newest checkpoint
        self.staleness, self.was_pending = 0, False
        self.speeds: dict[str, float] = {}
        self._speed_watch = SpeedWatch(say)
        self._run_dir, self._keeps = run_dir, not isinstance(cfg.task, BestOfNConfig)
        undefined = [] if policy.undefined_U is None else policy.undefined_U.tolist()
        self._sampling = {  # every number whose default a server may take from a model's files
            "temperature": cfg.generation.temperature,
            "logprobs": 0,
            "ignore_eos": True,  # the end tokens are ours, not those of the server's files
            "stop_token_ids": [*self._end_ids, *stop.token_ids],
            "stop": list(stop.strings),
            "include_stop_str_in_output": True,
            "logit_bias": {str(token): _NO_BIAS for token in undefined} or None,
            **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        }

    @property
    def _version(self) -> str:
        return f"{self._run}-{self._number}"

    def write_weights(self) -> None:
        """All ranks: write the weights that the next rollout is sampled with, as a new version.

        Rollouts that are sampled in the background are finished first.
        """
        if self._number and isinstance(self._cfg.task, BestOfNConfig):  # which trains nothing
            return
        self.finish_pending()
        self._number += 1
        model, base = self._policy.model, self._policy.causal_lm()
        if not isinstance(model, PeftModel) or self._number == 1:
            state = _whole_tensors(self._fabric, _base_tensors(base))
            if self._options.sync == "nccl":  # training changes them while servers sample ahead
                ahead = self._options.max_staleness > 0
                self._state = {name: tensor.clone() if ahead else tensor for name, tensor in state.items()}
            if self._options.sync != "nccl" or (self._is_tied and self._number == 1):
                self._write("policy", lambda folder: _save_untied(base, state, folder, self._tokenizer))
        if isinstance(model, PeftModel):
            adapter = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
            state = _whole_tensors(self._fabric, adapter)
            options: dict[str, Any] = {"selected_adapters": [POLICY], "save_embedding_layers": False}
            self._write("adapter", lambda folder: model.save_pretrained(str(folder), state_dict=state, **options))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        if not self._fabric.is_global_zero:
            return
        folder = self._folder / name
        try:
            with writing_errors(f"the weights for rollout servers cannot be written to {folder}", "free space there"):
                make_folders(folder.parent)
                with written_folder(folder) as new:
                    write(new)
                    if folder.exists():
                        discard(folder)
        except ModelError as error:
            self._problem = error  # of which the other ranks hear in `sample`

    def finish(self) -> None:
        """All ranks, after the last rollout: remove what was written for the servers, and the rollouts."""
        self._forget_before(_PER_RUN)
        if self._fabric.is_global_zero:
            with suppress(OSError):
                (self._run_dir / _KEPT).rmdir()
            for name in ("policy", "adapter"):
                remove_marked(self._folder / name)
            remove_marked(self._folder)

    def sample(self, prompts: Sequence[np.ndarray], uniforms: np.ndarray, number: int | None = None) -> list[Sampled]:
        """All ranks: return the responses to every prompt, sampled with the newest weights unless they are pending.

        Args:
            prompts: token ids of each.
            uniforms: (prompts, K, most new tokens) numbers in [0, 1); the first of a prompt is its seed.
            number: of a rollout that is learnt from: it may be pending, and is kept.

        Raises:
            RolloutServerError: no server has answered for `rollout.timeout` seconds, or one cannot do what is asked.
            ModelError: the weights could not be written.
        """
        found: _Answer | RolloutServerError | ModelError = _Answer([], [], {})
        key, pending = _key(prompts, uniforms), None if number is None else self._pending.pop(number, None)
        pending = pending if pending is not None and pending.key == key else None
        self.staleness = 0 if pending is None or number is None else number - pending.weights_of
        self.was_pending = pending is not None
        if self._fabric.is_global_zero:
            try:
                if self._problem is not None:
                    raise self._problem
                if pending is None:
                    found = run_coroutine(self._sample(prompts, uniforms))
                    if number is not None:
                        self._keep(number, number, key, found.sampled)
                else:
                    found = pending.answer.result()
                if number is not None and number < _PER_RUN:  # the others have fewer prompts
                    self._speed_watch.add(found.speeds)
            except (RolloutServerError, ModelError) as error:
                found = error
        found = self._fabric.broadcast(found)
        if isinstance(found, RolloutServerError | ModelError):  # on all ranks: none waits for the others
            raise found
        self._answered = found.urls
        places = {url: place for place, url in enumerate(self._urls, 1)}
        speeds = {f"{SPEED}/{places[url]}": speed for url, speed in found.speeds.items()}
        self.speeds = {} if number is None else speeds
        return found.sampled

    def has(self, prompts: Sequence[np.ndarray], uniforms: np.ndarray, number: int, weights_of: int) -> bool:
        """Return whether a rollout is pending, with the weights before the updates of rollout `weights_of`, or older.

        Its arguments are those of `sample`.
        """
        pending = self._pending.get(number)
        return pending is not None and pending.weights_of <= weights_of and pending.key == _key(prompts, uniforms)

    def sample_ahead(self, later: Mapping[int, tuple[Sequence[np.ndarray], np.ndarray]], weights_of: int) -> None:
        """All ranks: let rank zero sample later rollouts one after the other in the background, for `sample`.

        Args:
            later: prompts and random numbers of each, by its number; those that are pending are not sampled again.
            weights_of: the rollout before whose updates the newest weights were written.
        """
        later = {number: given for number, given in later.items() if not self.has(*given, number, weights_of)}
        futures = {number: Future[_Answer]() for number in later}
        for number, given in later.items():
            self._pending[number] = _Pending(weights_of, _key(*given), futures[number])

        def work() -> None:
            for number, given in later.items():
                try:
                    answer = asyncio.run(self._sample(*given))
                    self._keep(number, weights_of, _key(*given), answer.sampled)
                    futures[number].set_result(answer)
                except BaseException as error:
                    futures[number].set_exception(error)

        if later and self._fabric.is_global_zero:
            threading.Thread(target=work, daemon=True).start()

    def finish_pending(self) -> None:
        """Wait for the rollouts that are sampled in the background; errors are raised by `sample`."""
        if self._fabric.is_global_zero:
            wait([pending.answer for pending in self._pending.values()])

    def _keep(self, number: int, weights_of: int, key: str, sampled: list[Sampled]) -> None:
        """Rank zero: write a rollout to the run directory, whole or not at all; `restore` reads it."""
        if not self._keeps:
            return
        tensors = {
            "ids": np.concatenate([ids for one in sampled for ids in one.responses]),
            "logprobs": np.concatenate([values for one in sampled for values in one.logprobs]),
            "lengths": np.array([[len(ids) for ids in one.responses] for one in sampled]),
            "finished": np.array([one.finished for one in sampled]),
        }

        def write(folder: Path) -> None:
            save_file(tensors, folder / _KEPT_FILE)
            write_manifest(folder, {"weights_of": weights_of, "key": key})

        try:
            write_folder(make_folder(self._run_dir, _KEPT) / f"rollout-{number}", write)
        except (CheckpointError, UnsafePathError, OSError) as error:
            self._say(f"warning: a resumed run will sample rollout {number} again: {error}")

    def restore(self, first: int) -> None:
        """All ranks, before the first rollout of this process: take those that a stopped process has sampled.

        Those before rollout `first` are removed.
        """
        self._forget_before(first)
        self._saved_before = first
        found: dict[int, _Pending] = {}
        for number, path in self._kept():
            try:
                found[number] = _read_kept(path)
            except (CheckpointError, OSError, LookupError, TypeError, ValueError) as error:
                self._say(f"warning: rollout {number} is sampled again: {error}")
        facts = self._fabric.broadcast({number: kept[:2] for number, kept in found.items()})
        for number, (weights_of, key) in facts.items():
            self._pending[number] = found.get(number, _Pending(weights_of, key, Future()))

    @contextmanager
    def saving(self, following: int) -> Iterator[None]:
        """All ranks, around the writing of a checkpoint, from which a run goes on with rollout `following`.

        It comes with all rollouts that older weights sample. Those before it are removed after it is written; one that
        is written in the background may not be complete then, so the checkpoint before it counts.
        """
        self.finish_pending()
        yield
        self._forget_before(self._saved_before if self._cfg.task.async_checkpoints else following)
        self._saved_before = following

    def _forget_before(self, number: int) -> None:
        """All ranks: remove the rollouts before this one from the run directory."""
        for kept, path in self._kept():
            if kept % _PER_RUN < number:
                remove_folder(path)

    def _kept(self) -> list[tuple[int, Path]]:
        """Rank zero: return the numbers and folders of the rollouts in the run directory; no other ranks have any."""
        folder = self._run_dir / _KEPT
        if not self._fabric.is_global_zero or not folder.is_dir():
            return []
        sweep_scratch(folder)
        found = [(_KEPT_ROLLOUT.fullmatch(path.name), path) for path in folder.iterdir()]
        return [(int(match[1]), path) for match, path in found if match]

    def check(self, tokens: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float]:
        """Compare log-probabilities of the newest rollout by the servers ("sampled") and the trainer ("logprobs").

        Args:
            tokens: by name, for each prompt the numbers of its responses' tokens, nats.

        Returns:
            Metrics: the largest mean difference of a prompt's responses, and the largest of a token.

        Raises:
            RolloutMismatchError: the first is more than `rollout.tolerance`.
        """
        apart = [np.abs(one - other) for one, other in zip(tokens["sampled"], tokens["logprobs"], strict=True)]
        means = [float(one.mean()) for one in apart]
        worst, limit = int(np.argmax(means)), self._options.max_difference(self._cfg.fabric.precision)
        if not means[worst] <= limit:
            raise RolloutMismatchError(
                f"the server {self._answered[worst]} computes log-probabilities {means[worst]:.2g} nats a token from "
                f"the trainer's ({len(means)} prompts: mean {np.mean(means):.2g}), more than rollout.tolerance="
                f"{limit:g}: it does not sample from the policy. Start it with the model and the number format of the "
                "trainer, and --logprobs-mode processed_logprobs"
            )
        return {
            "rollout/server_difference": means[worst],
            "rollout/server_difference_max": float(max(map(np.max, apart))),
        }

    async def _sample(self, prompts: Sequence[np.ndarray], uniforms: np.ndarray) -> _Answer:
        found: dict[int, tuple[Sampled, str]] = {}
        failed: dict[str, str] = {}  # the newest reason of each server that has failed
        tokens, seconds = Counter[str](), dict.fromkeys(self._urls, 0.0)  # of each server
        pause, limit, since, said = _FIRST_WAIT, self._options.timeout, time.monotonic(), ""
        with tqdm(total=uniforms[..., 0].size, desc="sampling", leave=False, disable=None) as bar:

            async def ask(url: str, rows: deque[int], at_a_time: int) -> None:
                """Ask a server for some of the rows at a time, and for the next one after each answer."""
                began = time.monotonic()

                async def next_rows() -> None:
                    while rows and url not in failed:
                        row = rows.popleft()
                        try:
                            sampled = await self._ask(server, url, prompts[row], uniforms[row])
                        except UnavailableError as error:
                            failed[url] = str(error)
                            return
                        found[row] = sampled, url
                        tokens[url] += sum(map(len, sampled.responses))
                        bar.update(uniforms.shape[1])

                async with client(url, limit) as server, asyncio.TaskGroup() as group:
                    for _ in range(at_a_time):
                        group.create_task(next_rows())
                seconds[url] += time.monotonic() - began

            while len(found) < len(prompts):
                states = await asyncio.gather(*map(self._prepare, self._urls))
                ready = [url for url, reason in zip(self._urls, states, strict=True) if reason is None]
                ready = [url for url in ready if url not in failed] or ready
                failed = {url: reason for url, reason in zip(self._urls, states, strict=True) if reason is not None}
                todo, before = deque(row for row in range(len(prompts)) if row not in found), len(found)
                at_a_time = min(_IN_FLIGHT, -(-len(todo) // max(len(ready), 1)))
                try:
                    await asyncio.gather(*(ask(url, todo, at_a_time) for url in ready))
                except BaseExceptionGroup as errors:
                    raise _first(errors) from None
                if len(found) == len(prompts):
                    break
                problem = "; ".join(f"{url}: {reason}" for url, reason in failed.items())
                if len(found) > before:
                    since, pause = time.monotonic(), _FIRST_WAIT
                elif self._stops():
                    raise RolloutServerError(f"stopped by a signal while no server answered ({problem})")
                elif time.monotonic() - since + pause > limit:
                    raise RolloutServerError(
                        f"rollout.urls: no server has answered for rollout.timeout={limit:g} s ({problem}): start the "
                        "servers again, then go on with resume=true"
                    )
                if problem != said:
                    self._say(f"warning: rollout server {problem}: asking again")
                said = problem
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
        speeds = {url: tokens[url] / max(seconds[url], 1e-9) for url in self._urls if tokens[url] and url not in failed}
        answers = [found[row] for row in range(len(prompts))]
        return _Answer([sampled for sampled, _ in answers], [url for _, url in answers], speeds)

    async def _prepare(self, url: str) -> str | None:
        """Give a server the newest weights unless it has them; return why it cannot answer now, None if it can."""
        try:
            async with client(url, self._options.timeout) as server:
                info = await call(server, "GET", f"{url}/weight_info", seconds=self._check_seconds)
                version = str(info.get("weight_version"))
                if version != self._version:
                    await self._load(server, url, is_known=version.startswith(f"{self._run}-"))
        except UnavailableError as error:
            return str(error)
        self._failed_loads[url] = 0
        return None

    @property
    def _check_seconds(self) -> float:
        return min(SECONDS_OF_CHECK, self._options.timeout)

    async def _load(self, server: httpx.AsyncClient, url: str, *, is_known: bool) -> None:
        """Let a server load the newest weights, then name their version; one that is known has earlier ones of ours."""
        post = partial(self._post, server, url)
        if not self._of_adapter and self._is_tied:
            await self._check_head(server, url)
        await post("/pause?mode=abort")
        try:
            if self._options.sync == "nccl":
                await self._transfer(server, url, is_known=is_known)
            elif not self._of_adapter or not is_known:
                weights = {"weights_path": str(self._folder / "policy")}
                await post("/collective_rpc", {"method": "reload_weights", "kwargs": weights})
            if self._of_adapter:
                path = str(self._folder / "adapter")
                await post("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": path, "load_inplace": True})
        except UnavailableError as error:
            self._failed_loads[url] += 1
            if self._failed_loads[url] == _MAX_FAILED_LOADS:
                by_nccl = self._options.sync == "nccl"
                place = "sent by rollout.sync=nccl" if by_nccl else f"in {self._folder}"
                needed = _TRANSFER_OPTION if by_nccl else "the same path to that folder (rollout.sync_dir)"
                raise RolloutServerError(
                    f"the server {url} cannot load the weights {place} ({error}): give it the policy's model, and "
                    f"{needed}"
                ) from None
            raise
        await post("/reset_prefix_cache")
        await post("/resume")
        await post("/update_weight_version", {"new_version": self._version})

    @property
    def _of_adapter(self) -> bool:
        return isinstance(self._policy.model, PeftModel)

    @property
    def _is_tied(self) -> bool:
        return bool(self._policy.causal_lm().config.get_text_config().tie_word_embeddings)

    async def _post(self, server: httpx.AsyncClient, url: str, path: str, body: dict[str, Any] | None = None) -> None:
        await call(server, "POST", f"{url}{path}", body, seconds=self._options.timeout)

    async def _transfer(self, server: httpx.AsyncClient, url: str, *, is_known: bool) -> None:
        """Send the newest weights to a server by NCCL; one that was started again joins a new group first.

        Raises:
            UnavailableError: it fails, or does not take part within `rollout.timeout` seconds.
        """
        post = partial(self._post, server, url)

        async def together(path: str, body: dict[str, Any], work: Callable[[], None]) -> None:
            """Send a request, and do meanwhile what makes the server answer it."""
            done = in_thread(work)  # the process can end while NCCL waits for a dead server
            try:
                async with asyncio.timeout(self._options.timeout):
                    await asyncio.gather(post(path, body), asyncio.wrap_future(done))
            except RolloutServerError:
                raise
            except (TimeoutError, RuntimeError) as error:  # the latter of torch's NCCL
                raise UnavailableError(f"NCCL: {describe(error)}") from None

        transfer = self._transfers.pop(url, None)
        if transfer is None or not is_known:
            size = await call(server, "GET", f"{url}/get_world_size", seconds=self._check_seconds)
            transfer = WeightTransfer(int(size.get("world_size", 1)), self._fabric.device)
            await together("/init_weight_transfer_engine", {"init_info": transfer.init_info}, transfer.join)
        await post("/start_weight_update")
        info = {"update_info": update_info(self._state)}
        await together("/update_weights", info, partial(transfer.send, self._state))
        await post("/finish_weight_update")
        self._transfers[url] = transfer  # without it, after an error, the next attempt makes a new group

    async def _check_head(self, server: httpx.AsyncClient, url: str) -> None:
        """Check that a server's head is not tied to its embeddings: vLLM would keep the old head in every reload.

        Raises:
            RolloutMismatchError: its model is tied, or its folder cannot be read here.
        """
        config, _ = await served_model(server, url, self._check_seconds)
        if config.get("tie_word_embeddings", True):
            raise RolloutMismatchError(
                f"the server {url} has the model's head tied to its embeddings, and would keep the old head: start it "
                f"with --model {self._folder / 'policy'}, where both are separate, then go on with resume=true"
            )

    async def _ask(
        self, server: httpx.AsyncClient, url: str, prompt_ids: np.ndarray, uniforms_KN: np.ndarray
    ) -> Sampled:
        """Ask for the K responses to one prompt.

        Raises:
            UnavailableError: the server fails, or the responses are not of the newest weights.
            RolloutServerError: the server rejects the request, or is another program.
        """
        num_responses, num_new = uniforms_KN.shape
        numbers = {"n": num_responses, "max_tokens": num_new, "seed": first_seed(uniforms_KN)}
        body = {"token_ids": prompt_ids.tolist(), "sampling_params": self._sampling | numbers}
        body |= {"model": ADAPTER} if self._of_adapter else {}
        limit = (1 << 20) + _BYTES_PER_TOKEN * uniforms_KN.size
        path = f"{url}/inference/v1/generate"
        answer = await call(server, "POST", path, body, seconds=self._options.timeout, limit=limit, lost=True)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            versions = {str(span["version"]) for choice in choices for span in choice["weight_versions"] or ()}
            if versions - {self._version} or any(choice["finish_reason"] == "abort" for choice in choices):
                raise UnavailableError(f"its responses are of weights {sorted(versions)}, not {self._version}")
            rows = [self._response(choice, num_new) for choice in choices]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RolloutServerError(
                f"the server {url} gives malformed responses ({describe(error)}): {START}"
            ) from None
        if len(rows) != num_responses:
            raise RolloutServerError(f"the server {url} gives {len(rows)} responses instead of {num_responses}")
        if any(len(ids) < num_new and not finished for ids, _, finished in rows):
            raise RolloutServerError(
                f"the server {url} has cut a response before generation.max_new_tokens={num_new}: start it with "
                f"--max-model-len {self._cfg.data.max_prompt_length + num_new} or more"
            )
        if not all(len(ids) for ids, _, _ in rows):
            raise RolloutServerError(f"the server {url} gives a response without tokens, not even an end token")
        return Sampled(*zip(*rows, strict=True))

    def _response(self, choice: dict[str, Any], num_new: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return tokens, log-probabilities and whether the response ended, by our own end tokens and stop strings."""
        ids = np.array(choice["token_ids"][:num_new], dtype=np.int32)
        logprobs = np.array([token["logprob"] for token in choice["logprobs"]["content"][:num_new]], dtype=np.float32)
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} tokens have {len(logprobs)} log-probabilities")
        ids, logprobs, finished = cut_at_end(ids, logprobs, self._end_ids, self._stop or None)
        return ids, logprobs, finished or choice["finish_reason"] == "stop"


def _base_tensors(model: PreTrainedModel) -> dict[str, Any]:
    """Return the tensors of a model by their names, without those of adapters; tied ones are separate."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if "lora_" not in name:
            is_tied = id(tensor) in seen
            found[name.replace(".base_layer.", ".")] = tensor.detach().clone() if is_tied else tensor.detach()
            seen.add(id(tensor))
    return found


def _whole_tensors(fabric: Fabric, tensors: dict[str, Any]) -> dict[str, Any]:
    """All ranks: return whole tensors on rank zero, one after the other; those of parts are on its host."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if fabric.is_global_zero:
            found[name] = tensor if full is tensor else full.cpu()
    return found


def _save_untied(
    model: PreTrainedModel, state: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write what a server loads; its head is its own: vLLM does not reload a head that is tied to the embeddings."""
    with _untied(model):
        model.save_pretrained(str(folder), state_dict=state)
    tokenizer.save_pretrained(folder)


@contextmanager
def _untied(model: PreTrainedModel) -> Iterator[None]:
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    before = [getattr(config, "tie_word_embeddings", False) for config in configs]
    try:
        for config in configs:
            config.tie_word_embeddings = False
        yield
    finally:
        for config, tied in zip(configs, before, strict=True):
            config.tie_word_embeddings = tied


def _key(prompts: Sequence[np.ndarray], uniforms: np.ndarray) -> str:
    """Digest of prompts, seeds and sizes, which decide the responses of given weights."""
    parts = [repr((uniforms.shape, list(map(len, prompts)))).encode(), uniforms[:, 0, 0].tobytes()]
    return hashlib.sha256(b"".join([*parts, *(prompt.tobytes() for prompt in prompts)])).hexdigest()


def _read_kept(folder: Path) -> _Pending:
    """Return a rollout that `RolloutServers` has kept.

    Raises:
        CheckpointError: a file is damaged.
        ValueError: its sizes contradict each other.
    """
    facts, tensors = verify_manifest(folder), read_tensors(folder / _KEPT_FILE)
    ids, logprobs, lengths, finished = (tensors[name].numpy() for name in ("ids", "logprobs", "lengths", "finished"))
    if lengths.shape != finished.shape or not len(ids) == len(logprobs) == lengths.sum() or lengths.min() < 1:
        raise ValueError(f"{folder} has responses of other sizes than it says")
    borders, group = np.cumsum(lengths)[:-1], lengths.shape[1]
    rows = list(zip(np.split(ids, borders), np.split(logprobs, borders), finished.ravel().tolist(), strict=True))
    sampled = sampled_by_prompt(rows, group)
    kept = _Pending(facts["weights_of"], facts["key"], Future())
    kept.answer.set_result(_Answer(sampled, [""] * len(sampled), {}))
    return kept


def _first(errors: BaseExceptionGroup) -> BaseException:
    """Return the first error of nested groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
