"""SheepRLHF on the peers' fixed work: the same examples, updates and clock; prints one line `RESULT {json}`.

    python benchmarks/run_sheeprlhf.py --task sft|rm|dpo --work WORK --model tiny4k|tiny|smol [--precision fp32] [...]

WORK holds `data-<vocabulary>/pairs.jsonl`, `models/<name>/` and, for rm, `models/<name>-rm/`. Update k trains on rows
[k*batch, (k+1)*batch) in file order with AdamW at 1e-5 and gradients clipped at 1.0. Useful tokens are counted from the
file. `startup_s` is from the creation of the process to the end of the first update; warm-up updates are not timed;
memory is the process's peak RSS. dpo: the reference's log-probabilities are computed before the first update, as a run
reads them from its cache.
"""

import argparse
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PRECISIONS = {"fp32": "32-true", "bf16-mixed": "bf16-mixed", "bf16": "bf16-true"}


class Rows(list[Any]):
    """Examples from which micro-batches are cut, and their numbers of tokens."""

    def __init__(self, examples: list[Any], lengths: Any) -> None:
        super().__init__(examples)
        self.lengths = lengths

    def examples(self, part: list[int]) -> list[Any]:
        """Some of them."""
        return [self[i] for i in part]


def main() -> None:
    """Time `updates` optimizer steps after `warmup` ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sft", choices=["sft", "rm", "dpo"])
    parser.add_argument("--model", default="tiny4k")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", default="fp32", choices=sorted(PRECISIONS))
    parser.add_argument("--batch", type=int, default=8, help="examples of one update")
    parser.add_argument("--micro", type=int, default=8, help="most examples of one forward pass")
    parser.add_argument("--token-budget", type=int, default=2048, help="most tokens of one forward pass")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--full-loss", action="store_true", help="loss on prompt tokens too")
    parser.add_argument("--padded", action="store_true")
    parser.add_argument("--gc", action="store_true", help="gradient checkpointing")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tag", default="")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from sheeprlhf.utils.memory import set_malloc
    from sheeprlhf.utils.processes import seconds_since_start

    started = time.time() - seconds_since_start()
    set_malloc(sharded=False)  # as a job does
    import numpy as np
    import torch

    import sheeprlhf
    from sheeprlhf.agent.batches import Batches
    from sheeprlhf.agent.policy import load_policy
    from sheeprlhf.agent.reward import load_reward_model
    from sheeprlhf.data.example import Example
    from sheeprlhf.engine.fabric import make_fabric
    from sheeprlhf.engine.optim import build_optimizer
    from sheeprlhf.engine.step import LossFn, update
    from sheeprlhf.model.folder.load import load_tokenizer
    from sheeprlhf.structure.model import ModelConfig
    from sheeprlhf.structure.run import AdamWConfig, FabricConfig
    from sheeprlhf.structure.task import DPOConfig
    from sheeprlhf.task.reference import sum_by_response
    from sheeprlhf.task.train.dpo import dpo_loss
    from sheeprlhf.task.train.rm import rm_loss
    from sheeprlhf.task.train.sft import sft_loss

    folder = args.work / "models" / (f"{args.model}-rm" if args.task == "rm" else args.model)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    with (args.work / f"data-{vocabulary}" / "pairs.jsonl").open() as file:
        rows = [
            json.loads(line) for line, _ in zip(file, range(args.batch * (args.warmup + args.updates)), strict=False)
        ]
    names = ["response_ids"] if args.task == "sft" else ["chosen_ids", "rejected_ids"]
    examples = [
        Example(i, np.array(r["prompt_ids"], np.int32), tuple(np.array(r[name], np.int32) for name in names))
        for i, r in enumerate(rows)
    ]
    lengths = np.array([example.num_tokens() for example in examples], np.int32)
    split = Rows(examples, lengths)

    dtype = "bfloat16" if args.precision == "bf16" else "float32"
    model = ModelConfig(config_name="auto", repo_name=str(folder), dtype=dtype, gradient_checkpointing=args.gc)
    fabric = make_fabric(FabricConfig(accelerator=args.device, precision=PRECISIONS[args.precision]))
    fabric.launch()
    batching = "padded" if args.padded else "packed"
    load = load_reward_model if args.task == "rm" else load_policy
    trained = load(model, load_tokenizer(model), longest=int(lengths.max()), batching=batching)
    optimizer = build_optimizer(AdamWConfig(weight_decay=0.0), (trained.parameters(), 1e-5))
    module, optimizer = fabric.setup(trained, optimizer)
    options = SimpleNamespace(mini_batch_size=args.batch, micro_batch_size=args.micro, token_budget=args.token_budget)
    loss_fn: LossFn = sft_loss
    reference_seconds = 0.0
    more: dict[str, Any] = {"targets": "all" if args.full_loss else "response"}
    if args.task != "sft":
        more["num_items"] = lambda batch: len(batch.row_ids)
    if args.task == "rm":
        loss_fn, more["targets"] = partial(rm_loss, loss_type="last_token"), "last"
    if args.task == "dpo":
        loss_fn, reference = partial(dpo_loss, task=DPOConfig()), dict[int, torch.Tensor]()
        cut, began = Batches(fabric, options, packed=trained.packed, targets="response"), time.time()
        with torch.no_grad():
            for part, micro in cut.numbered(split, np.arange(len(split)), "reference"):  # type: ignore[arg-type]
                batch = fabric.to_device(micro.batch)
                sums_S = sum_by_response(module(batch).target_N, batch.response_index_N, 2 * len(part))
                reference |= dict(zip(part, sums_S.view(-1, 2).float().cpu(), strict=True))
        reference_seconds = time.time() - began
        more["extras"] = lambda _, part: torch.cat([reference[i] for i in part])
    batches = Batches(fabric, options, packed=trained.packed, **more)
    ends, losses = [], []
    for k in range(args.warmup + args.updates):
        micro_batches = batches.of(split, np.arange(k * args.batch, (k + 1) * args.batch))  # type: ignore[arg-type]
        losses.append(update(fabric, module, optimizer, micro_batches, loss_fn, max_grad_norm=1.0)["loss"])
        if args.device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.time())
    seconds = ends[-1] - ends[args.warmup - 1]
    prompts = [len(example.prompt_ids) * (len(example.responses) - 1) for example in examples]  # once for each response
    useful = int((lengths + np.array(prompts))[args.batch * args.warmup :].sum())
    result = {
        "framework": "sheeprlhf",
        "version": sheeprlhf.__version__,
        "task": args.task,
        "model": args.model,
        "precision": args.precision,
        "useful_tokens": useful,
        "samples": args.batch * args.updates,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(useful / seconds, 1),
        "samples_per_s": round(args.batch * args.updates / seconds, 3),
        "startup_s": round(ends[0] - started, 2),
        "reference_s": round(reference_seconds, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "step_times": [round(b - a, 3) for a, b in zip(ends[args.warmup - 1 :], ends[args.warmup :], strict=False)],
        "threads": torch.get_num_threads(),
        "settings": {key: str(value) for key, value in vars(args).items() if key != "work"},
        "losses": [round(loss, 4) for loss in losses[:8]],
    }
    if args.device == "cuda":
        result["peak_cuda_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
