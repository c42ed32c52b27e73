"""A calculator for a chat model: SFT on tool calls, then GRPO with `rollout.environment=calculator`.

    python benchmarks/calculator.py --work FOLDER --model HuggingFaceTB/SmolLM2-135M-Instruct

Word problems with numbers of three digits; the held-out ones are in no training file. Prints a Markdown table of the
validations of GRPO at its start, which is the model after SFT, and at its end, and transcripts of its first and last
rollout. All runs use LoRA. A finished run in FOLDER is not run again.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from instruct import Bench
from instruct_data import NAMES, THINGS

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'
SYSTEM = f"Solve the problem with the tool calculator. For example: {CALL % '12 + 30'}"
STORIES = (
    ("{name} has {a} {thing} and buys {b} more. How many?", "{a} + {b}"),
    ("{name} has {a} {thing} and sells {b}. How many?", "{a} - {b}"),
    ("{name} has {c} boxes with {a} {thing} each. How many {thing}?", "{c} * {a}"),
)
SHOWN = ("scores", "finished", "calls", "turns", "invalid_calls", "failed", "length", "kl")


def problem(rng: random.Random, *, solved: bool) -> dict[str, Any]:
    """A word problem with its answer; if asked, with the call and the last message."""
    story, expression = rng.choice(STORIES)
    b, a = sorted(rng.sample(range(100, 1000), 2))
    values = {"name": rng.choice(NAMES), "thing": rng.choice(THINGS), "a": a, "b": b, "c": rng.randint(3, 12)}
    expression = expression.format(**values)
    answer = str(eval(expression))
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": story.format(**values)}]
    if solved:
        messages.append({"role": "assistant", "content": CALL % expression})
        messages.append({"role": "tool", "content": answer})
        messages.append({"role": "assistant", "content": f"The answer is {answer}."})
    return {"messages": messages, "answer": answer}


def write(bench: Bench) -> None:
    """Write the rows, which depend on nothing."""
    rng, seen = random.Random(0), set[str]()
    bench.file("").parent.mkdir(parents=True, exist_ok=True)
    for name, count in (("solved", 256), ("solved-test", 16), ("asked", 512), ("test", 32)):
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            row = problem(rng, solved=name.startswith("solved"))
            text = row["messages"][1]["content"]
            if text not in seen:
                rows.append(row)
                seen.add(text)
        bench.file(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of data and runs")
    parser.add_argument("--model", required=True, help="hub id or folder of a chat model")
    parser.add_argument("--sft-steps", type=int, default=8, help="steps of 8 conversations")
    parser.add_argument("--steps", type=int, default=40, help="steps of GRPO")
    parser.add_argument("--responses", type=int, default=64, help="of a step of GRPO, 8 to each problem")
    parser.add_argument("--quick", action="store_true", help="two steps of each")
    given = parser.parse_args()
    folder = Path(given.model)
    bench = Bench(given.work.resolve(), str(folder.resolve()) if folder.is_dir() else given.model, given.quick)
    write(bench)
    lora = ["model.lora_cfg.targets=all-linear", "optim.schedule=constant"]
    words = ["task=sft", *bench.data("solved", "solved-test"), *lora, "data.train_on=all", "model.lora_cfg.lr=2e-3"]
    losses = bench.train("sft", given.sft_steps, *words, "task.mini_batch_size=8", "task.eval_at_start=true")[
        "val/loss"
    ]
    words = ["task=grpo", *bench.data("asked", "test"), *lora, "model.lora_cfg.lr=5e-4", "task.num_generations=8"]
    words += ["rollout.environment=calculator", "reward=function", "reward.path=environment", "task.init_kl_coeff=0"]
    words += [f"task.{name}={given.responses}" for name in ("rollout_size", "mini_batch_size", "micro_batch_size")]
    words += [f"task.sft_experiment_dir={bench.work / 'sft'}", "generation.max_new_tokens=96", "task.save_rollouts=2"]
    found = bench.train("grpo", given.steps, *words, "task.eval_at_start=true", "rollout.max_turns=3")
    print("| held-out | after SFT | after GRPO |\n| --- | --- | --- |")
    print(f"| SFT: loss before, after | {losses[0]:.3f} | {losses[-1]:.3f} |")
    for name in SHOWN:
        print(f"| {name} | {found[f'val/{name}'][0]:.3f} | {found[f'val/{name}'][-1]:.3f} |")
    print(f"rewards of the rollouts: {[round(score, 2) for score in found['objective/scores']]}")
    for file in sorted((bench.work / "grpo" / "rollouts").iterdir()):
        for row in pq.read_table(file).to_pylist()[:: max(given.responses // 2, 1)]:
            print(f"{file.stem}: reward {row['score']:g}: {row['response']!r}")


if __name__ == "__main__":
    main()
