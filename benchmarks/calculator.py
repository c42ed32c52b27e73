"""A calculator for a chat model: SFT on tool calls, then GRPO with `rollout.environment=calculator`.

    python benchmarks/calculator.py --work FOLDER --model HuggingFaceTB/SmolLM2-135M-Instruct

Word problems with numbers of three digits; the held-out ones are in no training file. Prints a Markdown table of the
evaluations of the model, of SFT and of GRPO, and the command that shows transcripts. All runs use LoRA. A finished run
in FOLDER is not run again.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from instruct import Bench
from instruct_data import NAMES, THINGS

from sheeprlhf import evaluate

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'
SYSTEM = "Use the calculator."  # short: every prompt has it
EPISODES = ["rollout.environment=calculator", "rollout.max_turns=3", "generation.max_new_tokens=72"]
EPISODES += ["reward=function", "reward.path=environment"]
STORIES = (
    ("{name} has {a} {thing} and buys {b} more. How many?", "{a} + {b}"),
    ("{name} has {a} {thing} and sells {b}. How many?", "{a} - {b}"),
    ("{name} has {c} boxes with {a} {thing} each. How many {thing}?", "{c} * {a}"),
)
SHOWN = ("env/calls", "env/invalid_calls", "env/turns", "env/failed", "response_tokens")


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
    for name, count in (("solved", 256), ("solved-test", 16), ("asked", 512), ("test", 64)):
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            row = problem(rng, solved=name.startswith("solved"))
            text = row["messages"][1]["content"]
            if text not in seen:
                rows.append(row)
                seen.add(text)
        bench.file(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Train, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of data and runs")
    parser.add_argument("--model", required=True, help="hub id or folder of a chat model")
    parser.add_argument("--sft-steps", type=int, default=3, help="steps of 8 conversations")
    parser.add_argument("--steps", type=int, default=12, help="steps of GRPO")
    parser.add_argument("--responses", type=int, default=32, help="of a step of GRPO, 8 to each problem")
    parser.add_argument("--seed", type=int, default=42, help="of runs and evaluations; the rows stay the same")
    parser.add_argument("--quick", action="store_true", help="two steps of each")
    given = parser.parse_args()
    folder = Path(given.model)
    bench = Bench(given.work.resolve(), str(folder.resolve()) if folder.is_dir() else given.model, given.quick)
    write(bench)
    lora = ["model.lora_cfg.targets=all-linear", "optim.schedule=constant", f"seed={given.seed}"]
    words = ["task=sft", *bench.data("solved", "solved-test"), *lora, "data.train_on=all", "model.lora_cfg.lr=2e-3"]
    bench.train("sft", given.sft_steps, *words, "task.mini_batch_size=8")
    words = ["task=grpo", *bench.data("asked", "test"), *lora, "model.lora_cfg.lr=5e-4", "task.num_generations=8"]
    words += [*EPISODES, "task.init_kl_coeff=0", f"task.sft_experiment_dir={bench.work / 'sft'}"]
    words += [f"task.{name}={given.responses}" for name in ("rollout_size", "mini_batch_size")]
    found = bench.train("grpo", given.steps, *words, "task.micro_batch_size=16", "task.save_rollouts=4")
    data = [word for word in bench.data("asked", "test") if word.startswith("data")]
    models = {
        "before SFT": [f"model.repo_name={bench.model}", "model=auto", f"output_dir={bench.work / 'eval'}"],
        "after SFT": [f"experiment_dir={bench.work / 'sft'}"],
        "after GRPO": [f"experiment_dir={bench.work / 'grpo'}"],
    }
    data += ["task.against=none", f"seed={given.seed}", *(["task.num_samples=4"] if given.quick else [])]
    results = [evaluate(["task=reward", *words, *data, *EPISODES]) for words in models.values()]
    print(f"| {results[0]['rows']} held-out problems | {' | '.join(models)} |\n| --- | --- | --- | --- |")
    for name in ("score", *SHOWN):
        print(f"| {name} | {' | '.join(f'{result[name]:.2f}' for result in results)} |")
    for name in ("sft", "grpo"):
        print(f"| {' | '.join(bench.cost(name))} |")
    print(f"rewards of the rollouts: {[round(score, 2) for score in found['objective/scores']]}")
    print(f"transcripts: python sheeprlhf.py report {bench.work / 'sft'} {bench.work / 'grpo'}")


if __name__ == "__main__":
    main()
