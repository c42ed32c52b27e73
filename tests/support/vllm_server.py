"""A server on loopback with vLLM's routes: it samples with plain transformers from the weights that it is given."""

import base64
import json
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.loopback import Handler, Server, running

Fault = Callable[[str, int], int | str | None]  # path and number of the request -> status, "close", "hang" or None

LOADING = threading.Lock()  # transformers changes its classes while it loads


def _load(folder: Path | str) -> Any:
    with LOADING:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class VLLMServer(Server):
    """Begins with the model of a folder.

    Attributes:
        requests: the path of each request.
        fault: decides what goes wrong.
        keeps_head: a reload does not change the head, as vLLM's of a tied model.
        raw_logprobs: log-probabilities are those before the temperature, vLLM's default.
        tied: the server reports a folder whose head is tied.
        longest: tokens of a prompt with its response, as --max-model-len.
        nccl: with it the server receives weights by NCCL.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(_Handler, port)
        self.folder, self.lock, self.released = folder, threading.RLock(), threading.Event()
        self.requests: list[str] = []
        self.fault: Fault = lambda path, number: None
        self.keeps_head = self.raw_logprobs = self.tied = False
        self.root = tempfile.TemporaryDirectory()
        self.longest = 10**6
        self.nccl: FakeNCCL | None = None
        self.restart()

    def restart(self) -> None:
        """Forget weights, adapter and version."""
        with self.lock:
            self.model = _load(self.folder)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
            self.version, self.adapters, self.paused = "default", {}, False
            self.group: Group | None = None
            self.updating = False

    def reload(self, folder: str) -> None:
        new = _load(folder)
        if [p.shape for p in new.get_input_embeddings().parameters()] != [
            p.shape for p in self.model.get_input_embeddings().parameters()
        ]:
            raise ValueError("shapes differ")
        if self.keeps_head:
            new.lm_head.weight = self.model.lm_head.weight
        self.model, self.adapters = new, {}

    def transfer(self, path: str, body: dict[str, Any]) -> int:
        """Answer a route of vLLM's weight transfer with its status; the order of the requests is vLLM's."""
        if self.nccl is None:
            return 500  # not configured
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            assert info.keys() == {"nccl_unique_id_b64", "rank_offset", "world_size", "packed"} and not info["packed"]
            self.group = self.nccl.join(base64.b64decode(info["nccl_unique_id_b64"], validate=True))
            assert (info["rank_offset"], info["world_size"]) == (1, 2)
            assert self.group.sent.get(timeout=20).shape == (1,)  # the sum over the group
        elif path == "/update_weights":
            assert self.updating and self.group is not None
            info, new = body["update_info"], {}
            for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                new[name] = self.group.sent.get(timeout=20)
                assert new[name].dtype == getattr(torch, dtype) and list(new[name].shape) == shape
            self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.clone())  # not tied
            self.model.load_state_dict(new)
        else:
            assert self.updating == (path == "/finish_weight_update")
            self.updating = not self.updating
        return 200

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        how, model = body["sampling_params"], self.model
        if body.get("model"):
            model = self.adapters[body["model"]]
        generator = torch.Generator().manual_seed(how["seed"])
        prompt = torch.tensor([body["token_ids"]] * how["n"])
        ids, bias_V = prompt, torch.zeros(model.config.vocab_size)
        for token, value in (how["logit_bias"] or {}).items():
            bias_V[int(token)] = value
        logprobs: list[torch.Tensor] = []
        num_new = min(how["max_tokens"], self.longest - prompt.shape[1])
        with torch.no_grad():
            for _ in range(num_new):
                logits = model(ids).logits[:, -1].float() + bias_V
                scaled = (logits / how["temperature"]).log_softmax(-1)
                token = torch.multinomial(scaled.exp(), 1, generator=generator)
                reported = logits.log_softmax(-1) if self.raw_logprobs else scaled
                logprobs.append(reported.gather(1, token)[:, 0])
                ids = torch.cat([ids, token], dim=1)
        choices = []
        for index, row in enumerate(ids[:, prompt.shape[1] :].tolist()):
            length, reason = self._end(row, how)
            content = [{"token_id": row[i], "logprob": float(logprobs[i][index])} for i in range(length)]
            span = {"version": self.version, "start": 0, "end": length}
            choices.append(
                {
                    "index": index,
                    "finish_reason": reason,
                    "token_ids": row[:length],
                    "logprobs": {"content": content},
                    "weight_versions": [span],
                }
            )
        return {"choices": choices}

    def _end(self, row: list[int], how: dict[str, Any]) -> tuple[int, str]:
        for length in range(1, len(row) + 1):
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            if row[length - 1] in how["stop_token_ids"] or any(stop in text for stop in how["stop"]):
                return length, "stop"
        return len(row), "length"


TRANSFER = {
    *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
}


class Group:
    """What the trainer sends to a server."""

    def __init__(self) -> None:
        self.sent: queue.Queue[torch.Tensor] = queue.Queue()
        self.members = threading.Barrier(2)


class FakeNCCL:
    """The functions of `torch.cuda.nccl` that the trainer calls, between threads."""

    def __init__(self) -> None:
        self.groups: dict[bytes, Group] = {}

    def unique_id(self) -> bytes:
        found = bytes([len(self.groups)]) * 128
        self.groups[found] = Group()
        return found

    def join(self, unique_id: bytes) -> Group:
        self.groups[unique_id].members.wait(20)
        return self.groups[unique_id]

    def init_rank(self, world_size: int, unique_id: bytes, rank: int) -> Group:
        assert (world_size, rank) == (2, 0)
        return self.join(unique_id)

    def broadcast(self, tensors: list[torch.Tensor], *, comms: list[Group]) -> None:
        comms[0].sent.put(tensors[0].clone())

    all_reduce = broadcast


class _Handler(Handler):
    server: VLLMServer

    def answer(self, body: bytes) -> None:
        server, path, asked = self.server, urlsplit(self.path).path, json.loads(body or b"{}")
        with server.lock:
            server.requests.append(path)
            number = server.requests.count(path)
        fault = server.fault(path, number)
        if path in TRANSFER and fault is None:
            fault = server.transfer(path, asked)
        if fault == "hang":
            server.released.wait(30)
        if fault in ("hang", "close"):
            self.close_connection = True
            return
        status, content = (fault, {"error": "made up"}) if isinstance(fault, int) else self._route(path, asked)
        self.send(content, status)

    def _route(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        server = self.server
        with server.lock:
            if path == "/get_world_size":
                return 200, {"world_size": 1}
            if path == "/weight_info":
                return 200, {"weight_version": server.version}
            if path == "/v1/models":
                config = json.loads((server.folder / "config.json").read_text())
                config["tie_word_embeddings"] = server.tied
                Path(server.root.name, "config.json").write_text(json.dumps(config))
                return 200, {"data": [{"id": "policy", "root": server.root.name, "max_model_len": server.longest}]}
            if path in ("/pause", "/resume"):
                server.paused = path == "/pause"
            elif path == "/collective_rpc":
                try:
                    server.reload(body["kwargs"]["weights_path"])
                except (ValueError, OSError) as error:
                    return 500, {"error": str(error)}
            elif path == "/v1/load_lora_adapter" and not body:
                return 400, {"error": "no adapter"}
            elif path == "/v1/load_lora_adapter":
                base = _load(server.folder)
                base.load_state_dict(server.model.state_dict())
                server.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
            elif path == "/update_weight_version":
                server.version = body["new_version"]
            elif path == "/inference/v1/generate":
                if not body:
                    return 400, {"error": "no prompt"}
                if body.get("model") and body["model"] not in server.adapters:
                    return 404, {"error": "no such model"}
                return (503, {"error": "paused"}) if server.paused else (200, server.generate(body))
            elif path != "/reset_prefix_cache":
                return 404, {"error": path}
        return 200, {}


@contextmanager
def vllm_server(folder: Path, port: int = 0) -> Iterator[VLLMServer]:
    """Serve until the block ends."""
    with running(VLLMServer(folder, port)) as server, server.root:
        try:
            yield server
        finally:
            server.released.set()
