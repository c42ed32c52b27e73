"""The recipes of `data=docstrings`, seed after seed: what reward models and DPO reach, and how long each takes.

    python benchmarks/preference_gates.py --work FOLDER [--seeds 0 1 2] [--suffix docstrings] [--temperature 0.7]
        [--coin] [--words-of sft "task.max_num_steps=40"] [WORD ...]

Fine-tunes with `experiment=sft_<suffix>`; from each fine-tuned model `experiment=dpo_<suffix>`, measured by
measure_preference.py on held-out prompts; from the first one a reward model by each loss, measured on the test split,
whose packages were never trained on. Prints two Markdown tables. A run that is there and finished is not run again.
With --coin the fine-tuning's texts are imperative or third person by the toss of a coin, and not by package: a large
model, which knows the imperative before, then writes either about as often.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from pyarrow import parquet

ROOT = Path(__file__).parents[1]
MEASURE = str(ROOT / "benchmarks" / "measure_preference.py")
LOSSES = ("last_token", "average", "per_sample")


def main() -> None:
    """Run the recipes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--suffix", default="docstrings", help="of the recipes: docstrings or smollm2_lora")
    parser.add_argument("--temperature", default="0.7")
    parser.add_argument("--rows", default="500")
    parser.add_argument("--coin", action="store_true", help="fine-tune on texts whose style a coin decides")
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), help="of the reward models")
    parser.add_argument("--words-of", nargs=2, action="append", default=[], metavar=("TASK", "WORDS"))
    parser.add_argument("words", nargs="*", help="more words for every training command")
    arguments = parser.parse_args()
    work, suffix = arguments.work.resolve(), arguments.suffix
    of_task = {task: given.split() for task, given in arguments.words_of}

    def train(task: str, name: str, *words: str) -> tuple[Path, float]:
        """A recipe's run and the seconds of its whole command."""
        run_dir = work / name
        clock = work / f"{name}.seconds"
        if not clock.is_file():
            start = time.monotonic()
            call(
                "train",
                f"experiment={task}_{suffix}",
                f"hydra.run.dir={run_dir}",
                *words,
                *arguments.words,
                *of_task.get(task, []),
            )
            clock.write_text(f"{time.monotonic() - start:.1f}")
        return run_dir, float(clock.read_text())

    work.mkdir(parents=True, exist_ok=True)
    rows, starts = [], {}
    fine_tunes_on = coin_rows(work / "coin.jsonl") if arguments.coin else []
    for seed in arguments.seeds:
        starts[seed], sft_seconds = train("sft", f"sft-{seed}", f"seed={seed}", *fine_tunes_on)
        start = f"task.sft_experiment_dir={starts[seed]}"
        run_dir, seconds = train("dpo", f"dpo-{seed}", f"seed={seed}", start)
        words = ["--rows", arguments.rows, "--temperature", arguments.temperature]
        output = subprocess.run(
            [sys.executable, MEASURE, str(run_dir), *words], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        found = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT")).split(" ", 1)[1])
        rows.append(
            f"| {seed} | {found['start/imperative']:.1%} / {found.get('start/third_person', 0):.1%} | "
            f"**{found['run/imperative']:.1%}** / {found.get('run/third_person', 0):.1%} | "
            f"{found['kl']:.2f} ± {found['kl_error']:.2f} | {found['start/perplexity']:.2f} | "
            f"{found['run/perplexity']:.2f} | **{found['perplexity_ratio']:.2f}** | "
            f"{sft_seconds:.0f} s | {seconds:.0f} s |"
        )
    print(
        "| seed | imperative / third person before | after | KL, nats | perplexity before | after | ratio | SFT | DPO |"
    )
    print("| --- " * 9 + "|", *rows, sep="\n")

    first = arguments.seeds[0]
    print("\n| reward model's loss | accuracy | pairs | margin | correlation with length | training |")
    print("| --- " * 6 + "|")
    for loss in arguments.losses:
        words = [f"task.loss_type={loss}", f"task.sft_experiment_dir={starts[first]}", f"seed={first}"]
        run_dir, seconds = train("rm", f"rm-{loss}", *words)
        call("eval", "task=preference", f"experiment_dir={run_dir}")
        found = json.loads((run_dir / "eval" / "preference-test-final.json").read_text())
        figures = f"{found['margin']:.2f} | {found['length_correlation']:.2f} | {seconds:.0f} s |"
        print(f"| {loss} | **{found['accuracy']:.4f}** | {found['pairs']:,} | {figures}", flush=True)


def coin_rows(path: Path) -> list[str]:
    """The embedded training rows, each with one of its two texts, and the words that train on them."""
    toss = random.Random(0)
    table = parquet.read_table(ROOT / "sheeprlhf/assets/docstrings/train.parquet")
    rows = [
        {"prompt": row["prompt"], "response": row[toss.choice(("chosen", "rejected"))]}
        for row in table.select(["prompt", "chosen", "rejected"]).to_pylist()
        if row["chosen"] and row["rejected"]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = ["data.reward_model_split=0", "data.validation_split=0.02", "data.test_split=0.02"]
    return ["data=local", f"data.train_file={path}", "data.max_length=128", "data.max_prompt_length=96", *splits]


def call(*words: str) -> None:
    """A command of ours; what it prints goes to standard error."""
    subprocess.run([sys.executable, str(ROOT / "sheeprlhf.py"), *words], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
