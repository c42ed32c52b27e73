"""The recipes of PPO, GRPO, RLOO and online DPO on `data=docstrings`, seed after seed: what they reach, how fast.

    python benchmarks/online_gates.py --work FOLDER --start SFT_RUN [SFT_RUN ...] [--reward-model RM_RUN]
        [--tasks ppo grpo rloo online_dpo]

Each fine-tuned run is the start of one seed. Trains `experiment=<task>_docstrings` from it, scored by the dataset's
rule, or `experiment=<task>_docstrings_rm`, scored by the reward model, and measures the result by measure_preference.py
on held-out prompts. Prints a Markdown table. A run that is there and finished is not run again.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEASURE = str(ROOT / "benchmarks" / "measure_preference.py")
TASKS = ("ppo", "grpo", "rloo", "online_dpo")


def main() -> None:
    """Run the recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--start", type=Path, nargs="+", required=True, help="fine-tuned runs, one a seed")
    parser.add_argument("--reward-model", type=Path, help="run of task=rm; without it the rule scores")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--temperature", default="0.7")
    parser.add_argument("--rows", default="500")
    parser.add_argument("words", nargs="*", help="more words for every training command")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    head = ["task", "seed", "imperative before", "after", "KL, nats", "perplexity ratio", "tokens", "distinct-2", "s"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for task in arguments.tasks:
        for seed, start in enumerate(arguments.start):
            run_dir, clock = work / f"{task}-{seed}", work / f"{task}-{seed}.seconds"
            recipe = f"{task}_docstrings" if arguments.reward_model is None else f"{task}_docstrings_rm"
            words = [f"experiment={recipe}", f"task.sft_experiment_dir={start.resolve()}", f"seed={seed}"]
            if arguments.reward_model is not None:
                words += [f"task.rm_experiment_dir={arguments.reward_model.resolve()}"]
            if not clock.is_file():
                began = time.monotonic()
                command = [sys.executable, str(ROOT / "sheeprlhf.py"), "train", *words, *arguments.words]
                subprocess.run([*command, f"hydra.run.dir={run_dir}"], check=True, stdout=sys.stderr)
                clock.write_text(f"{time.monotonic() - began:.1f}")
            options = ["--rows", arguments.rows, "--temperature", arguments.temperature]
            output = subprocess.run(
                [sys.executable, MEASURE, str(run_dir), *options], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            found = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT")).split(" ", 1)[1])
            print(
                f"| {task} | {seed} | {found['start/imperative']:.1%} | **{found['run/imperative']:.1%}** | "
                f"{found['kl']:.2f} ± {found['kl_error']:.2f} | {found['perplexity_ratio']:.2f} | "
                f"{last(run_dir, 'val/length'):.1f} | {last(run_dir, 'val/distinct_2'):.2f} | "
                f"{float(clock.read_text()):.0f} |",
                flush=True,
            )


def last(run_dir: Path, tag: str) -> float:
    """The newest value of a figure that the run logged."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["tag"] == tag][-1]


if __name__ == "__main__":
    main()
