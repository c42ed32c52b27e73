"""How speed changes with ranks, rows, lengths, groups, data and the size of the model: markdown tables, on the CPU.

    python benchmarks/scale.py [--quick] [ranks] [rows] [data] [memory] [startup]

`ranks`: SFT of model=tiny over 1, 2 and 4 processes of one thread. Weak scaling keeps the rows of a process, strong
scaling those of a step. The split of a step comes from a second measurement in which each collective begins with a
barrier and is waited for: `wait` is the time in barriers, that is for slower ranks; `gather` and `reduce` are in
collectives; `compute` is the rest. `rows`: tokens a second of one process. `data`: `benchmarks/prepare_rows.py`.
`memory`: the largest memory of a process beyond that after the imports, of each phase. `startup`: reading a model's
weights. `--quick` measures little, to see that everything runs. The first line has the load of the machine before and
the last one after the measurement: seconds are meaningful if it was idle, CPU seconds otherwise too.
"""

import argparse
import json
import multiprocessing
import os
import queue
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
TOKEN_BUDGET, LENGTH, ROWS = 2048, 128, 4
SPLIT = ("compute", "gather", "reduce", "wait", "step")


class Case(NamedTuple):
    """Work of a rank in a step: `rows` prompts of a quarter of `length`, each with `group` responses of the rest."""

    rows: int
    length: int = LENGTH
    group: int = 1

    def num_tokens(self) -> int:
        """Tokens if every response has a prompt of its own."""
        return self.rows * self.group * self.length


class Speed(NamedTuple):
    """Median seconds of a step, of the processor in it, and of its parts in the measurement with barriers."""

    step: float
    cpu: float
    parts: dict[str, float]


def measure(fabric: Any, cases: list[Case], steps: int) -> list[Speed]:
    """All ranks: train the embedded model on random tokens."""
    import numpy as np

    from sheeprlhf.agent.policy import load_policy
    from sheeprlhf.data.example import Example, collate_packed
    from sheeprlhf.engine.optim import set_up
    from sheeprlhf.engine.step import MicroBatch, update
    from sheeprlhf.model.folder.load import load_tokenizer
    from sheeprlhf.structure.model import TinyConfig
    from sheeprlhf.structure.run import AdamWConfig
    from sheeprlhf.task.train.sft import sft_loss

    model = TinyConfig()
    policy = load_policy(model, load_tokenizer(model), longest=512, batching="packed")
    module, optimizer = set_up(fabric, AdamWConfig(), policy, 1e-5)
    rng = np.random.default_rng(fabric.global_rank)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, 4096, length).astype(np.int32)

    def micro_batches_of(case: Case) -> list[MicroBatch]:
        prompt = case.length // 4
        responses = [tuple(ids(case.length - prompt) for _ in range(case.group)) for _ in range(case.rows)]
        examples = [Example(row, ids(prompt), texts) for row, texts in enumerate(responses)]
        size = max(1, TOKEN_BUDGET // examples[0].num_tokens())
        batches = [collate_packed(examples[first : first + size]) for first in range(0, case.rows, size)]
        return [MicroBatch(batch, len(batch.target_ids_N), tuple(range(size))) for batch in batches]

    def seconds(micro_batches: list[MicroBatch]) -> tuple[float, float]:
        start, cpu_start = time.perf_counter(), time.process_time()
        update(fabric, module, optimizer, micro_batches, sft_loss, max_grad_norm=1.0)
        return time.perf_counter() - start, time.process_time() - cpu_start

    works = [micro_batches_of(case) for case in cases]
    plain = []
    for work in works:
        seconds(work)  # not counted
        plain.append([median(values) for values in zip(*(seconds(work) for _ in range(steps)), strict=True)])
    found = []
    for work, (step, cpu) in zip(works, plain, strict=True):
        splits = []
        for _ in range(steps if fabric.world_size > 1 else 0):
            with timed_collectives(module) as spent:
                whole, _ = seconds(work)
            splits.append({**spent, "compute": whole - sum(spent.values()), "step": whole})
        parts = {name: median(split.get(name, 0.0) for split in splits) for name in SPLIT if splits}
        found.append(Speed(step, cpu, parts))
    return found


@contextmanager
def timed_collectives(module: Any) -> Iterator[dict[str, float]]:
    """All ranks: inside, collectives are waited for one after the other, and their seconds are counted by kind."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def mean_over_ranks(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        dist.all_reduce(bucket.buffer())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer().div_(dist.get_world_size()))
        return future

    spent = defaultdict[str, float](float)

    def timed(kind: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            dist.barrier()
            begun = time.perf_counter()
            work = collective(*args, **kwargs)
            if work is not None:
                work.wait()
            spent["wait"] += begun - start
            spent[kind] += time.perf_counter() - begun
            return work

        return run

    kinds = {"all_gather_single": "gather", "reduce_scatter_single": "reduce", "all_reduce": "reduce"}
    real = {name: getattr(dist, name) for name in kinds}
    for name, kind in kinds.items():
        setattr(dist, name, timed(kind, real[name]))
    found = (part for part in module.modules() if isinstance(part, DistributedDataParallel))
    wrapped: Any = next(found, None)
    try:
        if wrapped is not None and not hasattr(wrapped, "timed_hook"):
            wrapped.timed_hook = True  # stays registered: the plain steps come first
            wrapped.register_comm_hook(None, mean_over_ranks)
        yield spent
    finally:
        for name, collective in real.items():
            setattr(dist, name, collective)


def worker(
    rank: int, ranks: int, port: int, options: dict[str, Any], function: Callable[..., Any], args: tuple, results: Any
) -> None:
    """One rank of a launch; rank zero sends the results."""
    from sheeprlhf.engine.fabric import make_fabric
    from sheeprlhf.structure.run import FabricConfig
    from sheeprlhf.utils.memory import set_malloc

    set_malloc(sharded=options.get("strategy") == "fsdp2")  # as a run does
    if ranks > 1:
        torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        torchrun |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in torchrun.items()}, MASTER_ADDR="127.0.0.1")
    fabric = make_fabric(FabricConfig(devices=str(ranks), **options))
    fabric.launch()
    found = function(fabric, *args)
    if rank == 0:
        results.put(found)


def launch(ranks: int, options: dict[str, Any], function: Callable[..., Any], *args: Any) -> Any:
    """`function(fabric, *args)` in processes of one thread, forked from this one after its imports."""
    import torch

    import sheeprlhf.task.train.sft  # noqa: F401

    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    work = (port, options, function, args, results)
    processes = [context.Process(target=worker, args=(rank, ranks, *work), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    while True:
        try:
            found = results.get(timeout=1)
            break
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise SystemExit("a rank has failed") from None
    for process in processes:
        process.join()
    return found


def table(title: str, header: list[str], lines: list[list[Any]]) -> None:
    """Print a table as markdown."""
    print(f"\n### {title}\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for line in lines:
        cells = [
            f"{cell:,.3f}"
            if isinstance(cell, float) and cell < 10
            else f"{cell:,.0f}"
            if isinstance(cell, float)
            else str(cell)
            for cell in line
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def of_ranks(quick: bool) -> None:
    """Weak and strong scaling."""
    numbers, rows, steps = ((1, 2), 2, 1) if quick else ((1, 2, 4), ROWS, 3)
    [alone] = launch(1, {}, measure, [Case(rows)], steps)
    lines: dict[str, list[list[Any]]] = {"weak": [], "strong": []}
    for strategy in ("ddp", "fsdp2"):
        for ranks in numbers:
            cases, options = [Case(rows), Case(rows // ranks)], {"strategy": strategy}
            speeds = [alone] * 2 if ranks == 1 else launch(ranks, options, measure, cases, steps)
            for kind, speed, share in zip(lines, speeds, (ranks, 1), strict=True):
                tokens = Case(rows).num_tokens() * share
                efficiency = f"{tokens / speed.step / ranks / (Case(rows).num_tokens() / alone.step):.0%}"
                parts = [milliseconds(speed.parts[name]) if speed.parts else "-" for name in SPLIT]
                whole, cpu = milliseconds(speed.step), milliseconds(speed.cpu)
                lines[kind].append([strategy, ranks, tokens, whole, tokens / speed.step, efficiency, cpu, *parts])
    header = [
        "strategy",
        "ranks",
        "tokens",
        "step ms",
        "tokens/s",
        "efficiency",
        "CPU ms a rank",
        *SPLIT[:-1],
        "sum ms",
    ]
    for kind, found in lines.items():
        table(f"{kind.capitalize()} scaling", header, found)


def milliseconds(seconds: float) -> int:
    """Rounded."""
    return round(1000 * seconds)


def of_rows(quick: bool) -> None:
    """Tokens a second of one process against rows, length and group size."""
    cases = {
        "Rows of a step": [Case(rows) for rows in ((1, 2) if quick else (1, 4, 16, 64))],
        "Length of a row, 2,048 tokens a step": [
            Case(2048 // length, length) for length in ((256, 512) if quick else (32, 128, 512))
        ],
        "Responses of a prompt, 16 a step": [
            Case(16 // group, LENGTH, group) for group in ((1, 2) if quick else (1, 4, 16))
        ],
    }
    speeds = iter(launch(1, {}, measure, [case for some in cases.values() for case in some], 1 if quick else 3))
    for title, some in cases.items():
        lines = []
        for case in some:
            speed, tokens = next(speeds), case.num_tokens()
            lines.append([*case, milliseconds(speed.step), tokens / speed.step, tokens / speed.cpu])
        table(title, ["prompts", "tokens of a row", "responses", "step ms", "tokens/s", "tokens/CPU s"], lines)


def of_data(quick: bool) -> None:
    """Preparation of data against rows."""
    rows = ["200", "400"] if quick else ["1000", "10000", "100000"]
    command = [sys.executable, str(HERE / "prepare_rows.py"), "--rows", *rows]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    names = ["rows", "file_mb", "seconds", "cpu_seconds", "rows_per_cpu_s", "peak_mb"]
    results = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    table("Preparation of data", names, [[result[name] for name in names] for result in results])


def save_llama(folder: str, hidden: int, layers: int, vocabulary: int = 4096) -> int:
    """Write a Llama of random weights with the tokenizer of model=tiny; its number of parameters."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    from sheeprlhf.utils.home import embedded_folder

    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=11 * hidden // 4,
        num_attention_heads=hidden // 64,
        vocab_size=vocabulary,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_folder("embedded:tiny") / name, folder)
    return model.num_parameters()


def measure_memory(fabric: Any, folder: str, in_files: bool) -> list[list[float]]:
    """All ranks: MB of each rank, of each phase its peak, and of what is held after the step."""
    import ctypes

    import numpy as np

    from sheeprlhf.agent.policy import load_policy
    from sheeprlhf.data.example import Example, collate_packed
    from sheeprlhf.engine.checkpoint import TrainState, save_checkpoint
    from sheeprlhf.engine.optim import set_up
    from sheeprlhf.engine.step import MicroBatch, update
    from sheeprlhf.model.folder.load import load_tokenizer
    from sheeprlhf.structure.model import AutoModelConfig
    from sheeprlhf.structure.run import AdamWConfig
    from sheeprlhf.task.train.sft import sft_loss
    from sheeprlhf.utils.lightning import gather_objects

    def memory(field: str) -> float:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
        return int(line.split()[1]) / 1024

    found = [memory("VmRSS")]

    def note(field: str = "VmHWM") -> None:
        found.append(memory(field) - found[0])
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    cfg = AutoModelConfig(repo_name=folder)
    policy = load_policy(cfg, load_tokenizer(cfg), longest=512, batching="packed", in_files=in_files)
    module, optimizer = set_up(fabric, AdamWConfig(), policy, 1e-5)
    note()
    example = Example(0, np.arange(3, 19, dtype=np.int32), (np.arange(19, 67, dtype=np.int32),))
    batch = collate_packed([example])
    micro_batches = [MicroBatch(batch, len(batch.target_ids_N), (0,))]
    update(fabric, module, optimizer, micro_batches, sft_loss, max_grad_norm=1.0)
    note()
    ctypes.CDLL(None).malloc_trim(0)
    note("VmRSS")
    with tempfile.TemporaryDirectory() as run_dir:
        target = Path(fabric.broadcast(run_dir))
        save_checkpoint(fabric, target, TrainState(1), module, optimizer, config_hash="h", keep=1)
        note()
        fabric.barrier()
    return gather_objects(fabric, found[1:])


def of_memory(quick: bool) -> None:
    """Memory of a rank against the number of ranks."""
    shape = (128, 2) if quick else (512, 12, 16000)
    split: list[tuple[int, dict[str, Any]]] = [(2, {"strategy": "fsdp2"})]
    if not quick:
        split += [(4, {"strategy": "fsdp2"})]
        split += [(ranks, {"strategy": "fsdp2", "tensor_parallel": 2}) for ranks in (2, 4)]
    with tempfile.TemporaryDirectory() as folder:
        parameters, lines = f"{save_llama(folder, *shape) / 1e6:.1f}M", []
        for ranks, options in [(1, {}), *split]:
            peaks = zip(*launch(ranks, options, measure_memory, folder, ranks > 1), strict=True)
            strategy = " ".join(map(str, options.values())) or "none"
            lines.append([parameters, strategy, ranks, *(max(phase) for phase in peaks)])
    phases = ["load and shard", "a step", "held after it", "save a checkpoint"]
    table("Memory", ["parameters", "strategy", "ranks", *phases], lines)


def of_startup(quick: bool) -> None:
    """Seconds to load a model of random weights."""
    from sheeprlhf.agent.policy import load_policy
    from sheeprlhf.model.folder.load import load_tokenizer
    from sheeprlhf.structure.model import AutoModelConfig

    lines = []
    for hidden, layers in ((64, 2), (128, 2)) if quick else ((256, 6), (512, 8), (768, 12), (1024, 20)):
        with tempfile.TemporaryDirectory() as folder:
            parameters, cfg = save_llama(folder, hidden, layers), AutoModelConfig(repo_name=folder)
            wall, cpu = time.perf_counter(), time.process_time()
            load_policy(cfg, load_tokenizer(cfg), longest=512, batching="packed")
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            lines.append([f"{parameters / 1e6:.1f}M", wall, cpu, 4 * parameters / 1e6 / wall])
    table("Start-up", ["parameters", "seconds", "CPU seconds", "MB/s"], lines)


def load() -> str:
    """Processes that wanted a processor in the last minute and in the last 15 minutes, and how many processors."""
    minute, _, quarter = os.getloadavg()
    return f"load {minute:.1f} in the last minute, {quarter:.1f} in the last 15, of {os.cpu_count()} cores"


TABLES = {"ranks": of_ranks, "rows": of_rows, "data": of_data, "memory": of_memory, "startup": of_startup}


def main() -> None:
    """Print the tables that were asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    started = time.perf_counter()
    print(f"{time.strftime('%Y-%m-%d')}, torch {version('torch')}; {load()}", flush=True)
    for name in args.tables or TABLES:
        TABLES[name](args.quick)
    print(f"\n{time.perf_counter() - started:.0f} s; {load()}")


if __name__ == "__main__":
    main()
