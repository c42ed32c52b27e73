"""PPO, RLOO and GRPO on the peers' fixed work: the same prompts, updates and clock; prints one line `RESULT {json}`.

    python benchmarks/run_online.py --task ppo|rloo|grpo --work WORK --model tiny4k|tiny [--batch 32] [...]

WORK is as for run_sheeprlhf.py, with `models/<name>-rm/` for the reward model (and, for ppo, the critic). An update is
a rollout of `batch` responses of exactly `gen-len` tokens (nothing ends one), one for each prompt (rloo, grpo: four),
and `num-iterations` optimizer steps on all of them: AdamW at 1e-5, gradients clipped at 1.0. A response counts with its
prompt, once. `parts_s` are the seconds of sampling, of reading the rollout by the reference ("ref") and by reward model
and critic ("value_reward"), and of the update. With --profile the operations of the last update are written there.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any


def main() -> None:
    """Time `updates` rollouts and what is learnt from them, after `warmup` ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="ppo", choices=["ppo", "rloo", "grpo"])
    parser.add_argument("--model", default="tiny4k")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16-mixed"])
    parser.add_argument("--batch", type=int, default=32, help="responses of one update")
    parser.add_argument("--token-budget", type=int, default=2048, help="most tokens of one forward pass")
    parser.add_argument("--gen-len", type=int, default=53)
    parser.add_argument("--num-iterations", type=int, default=4)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--profile", type=Path, help="write the profiler's table of the last update here")
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
    from sheeprlhf.agent.policy import load_policy, reference_of
    from sheeprlhf.agent.reward import load_reward_model
    from sheeprlhf.data.example import Example
    from sheeprlhf.data.sampler import StepPlan
    from sheeprlhf.engine.fabric import make_fabric
    from sheeprlhf.engine.optim import build_optimizer
    from sheeprlhf.engine.step import LossFn, update
    from sheeprlhf.loss.advantage import group_advantages
    from sheeprlhf.model.folder.load import load_tokenizer
    from sheeprlhf.rollout.rollout import RolloutCollector, TermModel, token_values
    from sheeprlhf.structure.data import LocalDataConfig
    from sheeprlhf.structure.model import AutoModelConfig
    from sheeprlhf.structure.reward import ModelRewardConfig
    from sheeprlhf.structure.rollout import GRPOConfig, PPOConfig, RLOOConfig
    from sheeprlhf.structure.run import AdamWConfig, FabricConfig, GenConfig, TrainConfig
    from sheeprlhf.task.train.grpo import grpo_loss
    from sheeprlhf.task.train.ppo import policy_loss, set_up, value_loss, with_advantages
    from sheeprlhf.task.train.rloo import leave_one_out_advantages, rloo_loss

    group = 1 if args.task == "ppo" else 4
    folder, scorer = (args.work / "models" / name for name in (args.model, f"{args.model}-rm"))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    num_prompts = args.batch // group * (args.warmup + args.updates)
    with (args.work / f"data-{vocabulary}" / "pairs.jsonl").open() as file:
        rows = [json.loads(line) for line, _ in zip(file, range(num_prompts), strict=False)]
    nothing = (np.zeros(1, np.int32),)
    prompts = [Example(i, np.array(row["prompt_ids"], np.int32), nothing) for i, row in enumerate(rows)]
    longest = max(len(prompt.prompt_ids) for prompt in prompts) + args.gen_len

    sizes = {"rollout_size": args.batch, "mini_batch_size": args.batch, "micro_batch_size": args.batch}
    kind = {"ppo": PPOConfig, "rloo": RLOOConfig, "grpo": GRPOConfig}[args.task]
    task = kind(
        **sizes,
        num_generations=group,
        num_iterations=args.num_iterations,
        token_budget=args.token_budget,
        init_kl_coeff=0.05,
        max_grad_norm=1.0,
    )
    cfg = TrainConfig(
        task=task,
        model=AutoModelConfig(repo_name=str(folder)),
        data=LocalDataConfig(train_file=None),
        fabric=FabricConfig(
            accelerator=args.device, precision="32-true" if args.precision == "fp32" else args.precision
        ),
        optim=AdamWConfig(lr=1e-5, weight_decay=0.0),
        reward=ModelRewardConfig(folder=str(scorer)),
        generation=GenConfig(max_new_tokens=args.gen_len),
    )
    fabric = make_fabric(cfg.fabric)
    fabric.launch()
    tokenizer = load_tokenizer(cfg.model)
    tokenizer.eos_token = None
    how: dict[str, Any] = {"longest": longest, "batching": "packed"}
    policy = load_policy(cfg.model, tokenizer, **how)
    of_scorer = AutoModelConfig(repo_name=str(scorer))
    reward = load_reward_model(of_scorer, tokenizer, **how)
    reward.requires_grad_(False)
    rewards = {"model": TermModel(reward)}
    critic = None
    if isinstance(task, PPOConfig):
        critic = load_reward_model(of_scorer, tokenizer, **how)
        module, critic_module, optimizer = set_up(fabric, cfg, policy, critic)
    else:
        module, optimizer = fabric.setup(policy, build_optimizer(cfg.optim, (policy.parameters(), cfg.peak_lr())))
    collect = RolloutCollector(fabric, cfg, tokenizer, policy, reference_of(policy), rewards)
    per_token = partial(
        token_values, names=("logprobs", "reference", "advantages", *(["values", "returns"] * bool(critic)))
    )
    cut = partial(Batches, fabric, task, packed=policy.packed, targets="response", extras=per_token)
    batches = cut() if critic else cut(num_items=lambda batch: len(batch.response_lengths))
    of_policies: dict[str, LossFn] = {
        "ppo": partial(policy_loss, task=task, temperature=1.0),
        "rloo": partial(rloo_loss, task=task, temperature=1.0),
        "grpo": partial(grpo_loss, task=task, temperature=1.0, max_length=args.gen_len),
    }
    of_policy, of_critic = of_policies[args.task], partial(value_loss, task=task)

    ends, losses, parts = [], [], dict.fromkeys(("generate", "ref", "value_reward", "update"), 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            start = time.time()
            found = function(*given, **options)
            parts[name] += time.time() - start
            return found

        return call

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    collect.logprobs = timed("ref", collect.logprobs)  # type: ignore[method-assign]
    collect.values_of = timed("value_reward", collect.values_of)  # type: ignore[method-assign]
    per_rollout = args.batch // group
    for k in range(args.warmup + args.updates):
        if k == args.warmup:
            parts = parts | dict.fromkeys(parts, 0.0)
        began = time.time()
        rollout = collect(prompts[k * per_rollout : (k + 1) * per_rollout], k)
        if critic:
            rollout = rollout.with_tokens(values=collect.values_of(critic, rollout))
        sampled = time.time()
        if critic:
            rollout = with_advantages(rollout, task, 0.05, None)
        else:
            advantages_PG = group_advantages(torch.from_numpy(rollout.scores), scale=True)
            if args.task == "rloo":
                logprobs, lengths = (rollout.flat("logprobs"), rollout.flat("reference")), rollout.response_lengths
                _, advantages_PG = leave_one_out_advantages(*logprobs, rollout.scores, lengths, kl_coeff=0.05)
            rollout = rollout.with_advantages(advantages_PG)
        plan = StepPlan(len(rollout), per_rollout, args.num_iterations, seed=k)
        how = {"max_grad_norm": 1.0}
        profiled = args.profile is not None and k + 1 == args.warmup + args.updates
        with profiler if profiled else nullcontext():
            for step in range(plan.num_steps()):
                micro_batches = batches.of(rollout, plan.rows_of_step(step))
                if critic:
                    assert critic_module is not None
                    update(fabric, critic_module, optimizer, micro_batches, of_critic, **how)
                losses.append(update(fabric, module, optimizer, micro_batches, of_policy, **how)["loss"])
        if args.device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.time())
        parts["generate"] += sampled - began
        parts["update"] += ends[-1] - sampled
    parts["generate"] -= parts["ref"] + parts["value_reward"]  # they were read in the same time
    if args.profile:
        args.profile.write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=60))
    seconds = ends[-1] - ends[args.warmup - 1]
    useful = group * sum(len(prompt.prompt_ids) + args.gen_len for prompt in prompts[per_rollout * args.warmup :])
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
        "startup_s": round(ends[0] - started, 2),
        "parts_s": {name: round(value, 2) for name, value in parts.items()},
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
