"""Check a GPU: results equal to the CPU's, no waits of the host, memory as planned, speed.

    python benchmarks/gpu_check.py [--peer "PEER/python PEER/run_trl.py"] [--peak-tflops 989]
    python benchmarks/gpu_check.py --device cpu --tiny     # the same code without a GPU, in two minutes

Checks print a line each and, if one fails, the exit code is 1. The last table has the speed of every task on a random
model of 1.1B parameters in bf16-mixed. MFU counts 6 operations a parameter and useful token of each optimizer step, as
a share of the GPU's peak, without sampling. With --peer, TRL runs on the same work.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sheeprlhf
from sheeprlhf.agent.batches import packing_difference
from sheeprlhf.agent.policy import load_policy
from sheeprlhf.api.jobs import compose
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.scale_plan import step_plan
from sheeprlhf.utils.lightning import move_data_to_device
from tests.support.losses import LOSSES, loss_case

ROOT = Path(__file__).resolve().parents[1]
Metrics = dict[str, list[tuple[int, float]]]
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}  # dense bf16, teraflops
SHAPES = {  # of the speed table: hidden size, inner size, layers, heads, heads of keys, vocabulary
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "mini": (64, 128, 2, 4, 2, 512),
}


class Check(NamedTuple):
    """One line of the first table; `limit` None: a figure without a target."""

    name: str
    measured: float
    limit: float | None

    def passed(self) -> bool:
        """True if the figure is within its limit."""
        return self.limit is None or self.measured <= self.limit


def fabric_of(device: torch.device) -> str:
    """The option that chooses the device."""
    return "fabric=auto_cuda" if device.type == "cuda" else "fabric=cpu"


@contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """On a GPU, an operation for which the host waits raises RuntimeError."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def gradients(name: str, folder: Path, device: torch.device) -> tuple[float, torch.Tensor]:
    """Loss and all gradients of a tiny model in float32; the host may not wait on the way."""
    loss_fn, module, content = loss_case(name, folder)
    module, content = module.to(device), move_data_to_device(content, device)
    loss_fn(module, content)  # the first call may load kernels
    with waits_are_errors(device):
        output = loss_fn(module, content)
        output.total.backward()
    found = [p.grad.flatten().cpu() for p in module.parameters() if p.grad is not None]
    return output.total.item(), torch.cat(found)


def check_losses(device: torch.device, folder: Path) -> Iterator[Check]:
    """Loss and gradient of every loss function, against the CPU's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for number, name in enumerate(LOSSES):
        (loss, grad), (expected, expected_grad) = (
            gradients(name, folder / f"{number}-{where.type}", where) for where in (device, torch.device("cpu"))
        )
        apart = abs(loss - expected) / max(1.0, abs(expected))
        grad_apart = float((grad - expected_grad).abs().max() / expected_grad.abs().max().clamp(min=1e-6))
        yield Check(f"{name}: loss and gradient, float32, relative", max(apart, grad_apart), 1e-4)


def check_attention(device: torch.device, folder: Path) -> Iterator[Check]:
    """Packed attention in half precision (flash attention on a GPU) against padded rows, and its gradients."""
    make_model(folder, "mini")
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), dtype="bfloat16")
    policy = load_policy(cfg, load_tokenizer(cfg), longest=256, batching="packed").to(device)
    yield Check("packed and padded log-probabilities, bf16, nats", packing_difference(policy), 0.1)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        loss_fn, module, content = loss_case("sft", folder / str(dtype))
        module = module.to(device, dtype)
        loss_fn(module, move_data_to_device(content, device)).total.backward()
        found = torch.cat([p.grad.flatten().float() for p in module.parameters() if p.grad is not None])
        return found / found.norm()

    apart = float((gradient(torch.bfloat16) - gradient(torch.float32)).norm())
    yield Check("direction of the gradient, bf16 against float32", apart, 0.1)


def check_sampling(device: torch.device, folder: Path) -> Iterator[Check]:
    """Log-probabilities that the sampler reports, against a forward pass of plain transformers."""
    make_model(folder, "mini")
    policy, tokenizer = sheeprlhf.load_policy(str(folder)).to(device).eval(), sheeprlhf.load_tokenizer(str(folder))
    found = sheeprlhf.sample(policy, tokenizer, ["t5 t6 t7", "t8 t9"], num_responses=4, max_new_tokens=24)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    plain, start, worst = plain.to(device).eval(), 0, 0.0
    for example in found.examples:
        for response in example.responses:
            ids = torch.tensor([*example.prompt_ids, *response], device=device)[None]
            with torch.no_grad():
                logprobs_TV = plain(ids).logits[0].float().log_softmax(-1)
            targets = ids[0, len(example.prompt_ids) :]
            expected = logprobs_TV[len(example.prompt_ids) - 1 : -1].gather(1, targets[:, None]).squeeze(1)
            sampled = found.logprobs_N[start : start + len(response)]
            worst, start = max(worst, float((expected - sampled).abs().max())), start + len(response)
    yield Check("log-probabilities of sampled tokens, float32, nats", worst, 1e-3)


def metrics_of(options: list[str]) -> Metrics:
    """The logged metrics of a training, whose output goes to the standard error."""
    with redirect_stdout(sys.stderr):
        return sheeprlhf.train(options).metrics


def check_runs(device: torch.device, folder: Path) -> Iterator[Check]:
    """Whole runs on the embedded model: the device against the CPU, one sharded rank against none, planned memory."""

    def losses(name: str, *options: str) -> Metrics:
        words = ["task=sft", "task.max_num_steps=4", "task.max_eval_batches=1", "seed=7", f"root_dir={folder / name}"]
        return metrics_of([*words, *options])

    def apart(one: Metrics, other: Metrics) -> float:
        pairs = zip(one["train/loss"], other["train/loss"], strict=True)
        return max(abs(a - b) for (_, a), (_, b) in pairs)

    own = losses("own", fabric_of(device))
    yield Check("losses of 4 steps of task=sft against the CPU's", apart(own, losses("cpu", "fabric=cpu")), 1e-3)
    sharded = losses("sharded", fabric_of(device), "fabric.strategy=fsdp2")
    yield Check("losses with fabric.strategy=fsdp2 on one rank against none", apart(own, sharded), 1e-4)


def check_memory(device: torch.device, folder: Path, model: Path) -> Iterator[Check]:
    """Peak of three steps of supervised fine-tuning on the longest rows over the planned one."""
    folder.mkdir()
    texts = (" ".join(f"t{3 + (i + k) % 300}" for i in range(255)) for k in range(64))
    (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "{text}", "response": "{text}"}}\n' for text in texts))
    options = ["task=sft", "task.max_num_steps=3", "task.mini_batch_size=8", "task.micro_batch_size=8"]
    options += ["data=local", f"data.train_file={folder / 'rows.jsonl'}", "data.max_length=512", f"root_dir={folder}"]
    options += ["model=auto", f"model.repo_name={model}", fabric_of(device), "fabric.precision=bf16-mixed"]
    config = compose("train", options).config
    assert isinstance(config, TrainConfig)
    planned = step_plan(config, device=device.type).total()
    peak = 1e9 * max(value for _, value in metrics_of(options)["memory/peak_gb"])
    limit = 1.0 if device.type == "cuda" else None  # a CPU's process also holds the libraries
    yield Check(f"peak memory over the planned one ({planned / 1e9:.2f} GB)", peak / planned, limit)


def make_model(folder: Path, shape: str) -> None:
    """A random Llama, a reward model with the same backbone (`<folder>-rm`), and a tokenizer of one token a word."""
    hidden, inner, layers, heads, keys, vocabulary = SHAPES[shape]
    words = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"t{i}": i for i in range(3, vocabulary)}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    config.num_labels = 1
    dtype = torch.float32 if shape == "mini" else torch.bfloat16
    for auto, path in ((AutoModelForCausalLM, folder), (AutoModelForSequenceClassification, Path(f"{folder}-rm"))):
        torch.manual_seed(0)
        auto.from_config(config, dtype=dtype).save_pretrained(path)
        tokenizer.save_pretrained(path)


def make_work(work: Path, shape: str, rows: int) -> None:
    """Models and pairs of random tokens, as `run_sheeprlhf.py` and `run_online.py` read them."""
    vocabulary, longest = SHAPES[shape][-1], 24 if shape == "mini" else 256
    make_model(work / "models" / shape, shape)
    rng = np.random.default_rng(0)

    def ids() -> list[int]:
        return rng.integers(3, vocabulary, int(rng.integers(longest // 4, longest + 1))).tolist()

    folder = work / f"data-{vocabulary}"
    folder.mkdir(parents=True)
    lines = ({f"{name}_ids": ids() for name in ("prompt", "response", "chosen", "rejected")} for _ in range(rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def speed(command: str, task: str, work: Path, shape: str, device: torch.device, *options: str) -> dict[str, Any]:
    """The result of a benchmark's process."""
    words = [*shlex.split(command), "--task", task, "--work", str(work), "--model", shape, *options]
    words += [] if "run_trl" in command else ["--device", device.type]
    done = subprocess.run(words, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{shlex.join(words)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def print_speeds(device: torch.device, work: Path, shape: str, peer: str | None, peak: float | None) -> None:
    """One line a task."""
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(work / "models" / shape).parameters())
    print(
        "| task | tokens/s | MFU | peak GB | TRL's tokens/s | times |\n| --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for task in ("sft", "rm", "dpo", "ppo", "grpo"):
        online = task in ("ppo", "grpo")
        script = ROOT / "benchmarks" / ("run_online.py" if online else "run_sheeprlhf.py")
        options = [
            "--precision",
            "bf16-mixed",
            "--batch",
            "16" if online else "8",
            "--updates",
            "1" if shape == "mini" else "3",
            "--warmup",
            "1",
        ]
        own = speed(f"{sys.executable} {script}", task, work, shape, device, *options)
        passes, seconds = (4, own["parts_s"]["update"]) if online else (1, own["seconds"])
        flops = 6 * parameters * own["useful_tokens"] * passes * (2 if task == "ppo" else 1) / seconds
        mfu = f"{flops / (peak * 1e12):.0%}" if peak else ""
        memory = own["peak_cuda_mb"] / 1024 if "peak_cuda_mb" in own else own["peak_rss_mb"] / 1024
        other = speed(peer, task, work, shape, device, *options)["tokens_per_s"] if peer else None
        ratio = f"{own['tokens_per_s'] / other:.2f}" if other else ""
        print(f"| {task} | {own['tokens_per_s']:,.0f} | {mfu} | {memory:.1f} | {other or ''} | {ratio} |", flush=True)


def main() -> int:
    """Run all checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--tiny", action="store_true", help="the speed table and the memory check on a model of two layers"
    )
    parser.add_argument("--peer", help="command that runs TRL on the same work")
    parser.add_argument("--peak-tflops", type=float, help="the GPU's peak in bf16; known for " + ", ".join(PEAKS))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; give --device cpu --tiny for a trial without one")
    device, shape, started = torch.device(args.device), "mini" if args.tiny else "1b", time.monotonic()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    peak = args.peak_tflops or next((value for key, value in PEAKS.items() if key in name), None)
    transformers.utils.logging.disable_progress_bar()
    versions = (f"{module.__name__} {module.__version__}" for module in (torch, transformers, sheeprlhf))
    print(f"{name}, {', '.join(versions)}\n")
    print("| check | measured | limit | |\n| --- | --- | --- | --- |", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_work(work, shape, rows=64)
        checks: list[Callable[[Path], Iterator[Check]]] = [
            partial(check_losses, device),
            partial(check_attention, device),
            partial(check_sampling, device),
            partial(check_runs, device),
            partial(check_memory, device, model=work / "models" / shape),
        ]
        for number, function in enumerate(checks):
            for check in function(work / f"check-{number}"):
                failed += not check.passed()
                limit, verdict = (
                    "" if check.limit is None else f"{check.limit:g}",
                    "" if check.passed() else "**failed**",
                )
                print(f"| {check.name} | {check.measured:.2g} | {limit} | {verdict} |", flush=True)
        print()
        print_speeds(device, work, shape, args.peer, peak)
    print(f"\n{failed} checks failed; {time.monotonic() - started:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
