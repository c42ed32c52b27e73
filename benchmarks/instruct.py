"""Four trainings of a chat model on synthetic conversations, measured before and after.

    python benchmarks/instruct.py --work FOLDER --model HuggingFaceTB/SmolLM2-135M-Instruct [grpo sft ...]

grpo:         word problems with a reward function; greedy accuracy, best of 8, majority of 8, at two levels
sft:          multi-turn conversations, `data.train_on=all`; held-out perplexity, exact match of each turn
preferences:  a reward model and DPO on pairs of messages; held-out accuracy, one pair against plain transformers
adapter:      an adapter that plain PEFT trained is trained further; its first loss against PEFT's

Prints Markdown tables, and samples. All runs use LoRA. A finished run in FOLDER is not run again. `--quick` tests the
script: two steps and four held-out rows.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import instruct_data
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf import evaluate, load_policy, load_tokenizer, prepare_data, sample
from sheeprlhf.task.eval.result import interval_of

ROOT = Path(__file__).parents[1]
Row = tuple[str, ...]  # figure, before, after


class Bench(NamedTuple):
    """The model, and the folder of data and runs.

    Attributes:
        work: folder.
        model: hub id or folder.
        quick: two steps, four held-out rows.
    """

    work: Path
    model: str
    quick: bool

    def file(self, name: str) -> Path:
        """The file of a set."""
        return self.work / "data" / f"{name}.jsonl"

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a set that are evaluated."""
        return [json.loads(line) for line in self.file(name).read_text().splitlines()[: 4 if self.quick else 128]]

    def data(self, train: str, *held_out: str) -> list[str]:
        """The options of model and data."""
        files = f"[{','.join(str(self.file(name)) for name in held_out)}]"
        model = ["model=auto", f"model.repo_name={self.model}"]
        splits = [f"data.train_file={self.file(train)}", f"data.validation_file={files}", f"data.test_file={files}"]
        return [*model, "data=local", *splits, "data.max_length=256", "data.max_prompt_length=200"]

    def train(self, name: str, steps: int, *words: str) -> dict[str, list[float]]:
        """Train with LoRA if the run is not finished; returns the values of its metrics."""
        run_dir, steps = self.work / name, 2 if self.quick else steps
        if not (run_dir / "final").is_dir():
            command = [
                "train",
                *words,
                "model.finetune_mode=LORA",
                "task.log_interval=1",
                f"task.max_num_steps={steps}",
            ]
            command += ["task.max_eval_batches=null", f"task.eval_interval={steps}", f"hydra.run.dir={run_dir}"]
            print(*command, file=sys.stderr, flush=True)
            program = [sys.executable, str(ROOT / "sheeprlhf.py")]
            subprocess.run([*program, *command], check=True, stdout=sys.stderr, cwd=ROOT / "benchmarks")
        metrics: dict[str, list[float]] = {}
        with (run_dir / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                metrics.setdefault(row["tag"], []).append(float(row["value"]))
        return metrics

    def cost(self, name: str) -> Row:
        """Time and memory of a run, from its first file to its last."""
        first, last = self.work / name / "config.yaml", self.work / name / "run.json"
        peak = json.loads(last.read_text())["peak_memory"] / 1e9
        return (
            f"{name}: training, peak memory",
            "",
            f"{last.stat().st_mtime - first.stat().st_mtime:.0f} s, {peak:.1f} GB",
        )

    def answers(self, model: str, name: str, rows: int, count: int = 1) -> list[list[str]]:
        """Responses of a model or a run to the first `rows` prompts: the greedy one, or `count` sampled ones."""
        tokenizer = load_tokenizer(model)
        options: dict[str, Any] = {"max_length": 256, "max_prompt_length": 200, "remove_same_inputs": False}
        options["test_file"] = str(self.file(name))
        data = prepare_data(str(self.file("recall-train")), tokenizer, kind="prompts", **options)
        prompts = data.splits["test"].examples(range(rows))
        assert [prompt.row_id for prompt in prompts] == list(range(rows))
        top_k = 1 if count == 1 else 0
        return sample(load_policy(model), tokenizer, prompts, num_responses=count, top_k=top_k, max_new_tokens=16).texts


def grpo(bench: Bench) -> list[Row]:
    """Word problems; the reward is 1 for the right number."""
    words = ["task=grpo", *bench.data("problems-train", "problems-test"), "reward=function"]
    words += ["reward.path=instruct_data:correct", "model.lora_cfg.targets=all-linear", "model.lora_cfg.lr=5e-4"]
    words += ["optim.schedule=constant", "generation.max_new_tokens=16", "task.init_kl_coeff=0"]
    words += ["task.rollout_size=64", "task.mini_batch_size=32", "task.micro_batch_size=32", "task.num_generations=8"]
    scores = bench.train("grpo", 120, *words)["objective/scores"]
    tenth = -(-len(scores) // 10)
    table: list[Row] = [("training samples", f"{np.mean(scores[:tenth]):.3f}", f"{np.mean(scores[-tenth:]):.3f}")]
    for level in ("problems-test", "problems-hard"):
        rows = bench.rows(level)

        def right(texts: list[list[str]], rows: list[dict[str, Any]] = rows) -> np.ndarray:
            """(prompts, responses) 1 for a right response."""
            asked = zip(texts, rows, strict=True)
            return np.array([instruct_data.correct(text, [row["answer"]] * len(text)) for text, row in asked])

        greedy = [bench.answers(model, level, len(rows)) for model in (bench.model, str(bench.work / "grpo"))]
        show([row["prompt"] for row in rows], *greedy)
        table.append((f"{level}, greedy", *(share(right(texts)[:, 0]) for texts in greedy)))
        sampled = bench.answers(bench.model, level, len(rows), 8)
        votes = [[Counter(map(last_number, texts)).most_common(1)[0][0]] for texts in sampled]
        table.append((f"{level}, one sample", share(right(sampled).mean(axis=1)), ""))
        table.append((f"{level}, majority of 8", share(right(votes)[:, 0]), ""))
        table.append((f"{level}, best of 8", share(right(sampled).max(axis=1)), ""))
    return [*table, bench.cost("grpo")]


def last_number(text: str) -> str:
    """The last number of a text, or nothing."""
    return (instruct_data.NUMBER.findall(text) or [""])[-1]


def sft(bench: Bench) -> list[Row]:
    """Conversations of three answers, all of which are trained on."""
    words = ["task=sft", *bench.data("recall-train", "recall-test"), "data.train_on=all", "task.eval_at_start=true"]
    words += ["task.mini_batch_size=8", "model.lora_cfg.targets=all-linear", "model.lora_cfg.lr=1e-3"]
    metrics = bench.train("sft", 10, *words)
    table: list[Row] = [(f"held-out {name}", *ends(metrics[f"val/{name}"])) for name in ("loss", "perplexity")]
    talks = [row["messages"] for row in bench.rows("recall-test")]
    prompts = [talk[: 2 + 2 * turn] for turn in range(3) for talk in talks]  # up to each of the three answers
    bench.file("recall-turns").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    both = [bench.answers(model, "recall-turns", len(prompts)) for model in (bench.model, str(bench.work / "sft"))]
    for turn in range(3):
        part = slice(turn * len(talks), (turn + 1) * len(talks))
        show(prompts[part], *(texts[part] for texts in both))
        right = [talk[2 + 2 * turn]["content"] for talk in talks]
        exact = ([text == answer for (text,), answer in zip(texts[part], right, strict=True)] for texts in both)
        table.append((f"exact match, answer {turn + 1}", *map(share, exact)))
    return [*table, bench.cost("sft")]


def preferences(bench: Bench) -> list[Row]:
    """A reward model and DPO on the same pairs of conversations."""
    kinds = ("preference-wrong", "preference-unhelpful")
    words = [*bench.data("preference-train", *kinds), "task.mini_batch_size=8", "task.eval_at_start=true"]
    words += ["model.lora_cfg.targets=all-linear"]
    table: list[Row] = []
    for task, rate in (("rm", "1e-3"), ("dpo", "5e-4")):
        metrics = bench.train(task, 8, f"task={task}", f"model.lora_cfg.lr={rate}", *words)
        for name in ("rewards/accuracies", "rewards/margins"):
            table.append((f"{task}, held-out {name}", *ends(metrics[f"val/{name}"])))
        for kind in kinds:
            run = evaluate(
                ["task=preference", f"experiment_dir={bench.work / task}", f"data.test_file={bench.file(kind)}"]
            )
            table.append((f"{task}, accuracy, {kind}", "", interval(run)))
        table.append(bench.cost(task))
    for kind in kinds:
        before = evaluate(["task=preference", *bench.data("preference-train", kind), f"output_dir={bench.work}"])
        table.append((f"log-probability alone, accuracy, {kind}", interval(before), ""))
    rows = bench.rows("preference-wrong")
    texts = [bench.answers(model, "preference-wrong", len(rows)) for model in (bench.model, str(bench.work / "dpo"))]
    show([row["prompt"] for row in rows], *texts)
    facts = [row["chosen"][0]["content"].split()[3] for row in rows]  # Your color is red. Happy to help!
    found = ([fact.lower() in text.lower() for (text,), fact in zip(t, facts, strict=True)] for t in texts)
    table.append(("dpo, greedy answer has the fact", *map(share, found)))
    return [*table, *compare_pair(bench)]


def compare_pair(bench: Bench) -> list[Row]:
    """Log-probabilities of one pair, summed over the tokens, by `evaluate` and by plain transformers."""
    words = ["task=preference", "task.num_samples=1", "task.beta=1", f"output_dir={bench.work}/pair"]
    ours = evaluate([*words, *bench.data("preference-train", "preference-wrong")])
    model, tokenizer = plain_model(bench)
    row, table = bench.rows("preference-wrong")[0], list[Row]()
    for name in ("chosen", "rejected"):
        with torch.no_grad():
            plain = -nll(model, tokenizer, [*row["prompt"], *row[name]]).sum().item()
        ours_too = ours[f"score_{name}"]
        assert abs(plain - ours_too) <= 1e-4, (plain, ours_too)
        table.append(
            (f"log-probability of one {name} answer: plain transformers, ours", f"{plain:.5f}", f"{ours_too:.5f}")
        )
    return table


def adapter(bench: Bench) -> list[Row]:
    """PEFT trains an adapter on last answers; this project trains it further."""
    model, tokenizer = plain_model(bench)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    talks = [json.loads(line)["messages"] for line in bench.file("recall-train").read_text().splitlines()]
    held_out = [json.loads(line)["messages"] for line in bench.file("recall-test").read_text().splitlines()]

    def loss(talks: list[list[dict[str, str]]]) -> torch.Tensor:
        return torch.cat([nll(model, tokenizer, talk) for talk in talks]).mean()

    with torch.no_grad():
        before = loss(held_out).item()
    for step in range(2 if bench.quick else 4):
        loss(talks[8 * step : 8 * step + 8]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = loss(held_out).item()
    model.save_pretrained(str(bench.work / "peft"))
    words = ["task=sft", *bench.data("recall-train", "recall-test"), f"model.adapter={bench.work / 'peft'}"]
    words += ["task.mini_batch_size=8", "task.eval_at_start=true", "model.lora_cfg.lr=1e-3"]
    losses = bench.train("adapter", 6, *words)["val/loss"]
    assert abs(losses[0] - after) <= 1e-5, (losses[0], after)
    return [
        ("held-out loss, plain PEFT's training", f"{before:.6f}", f"{after:.6f}"),
        ("held-out loss, our training of the adapter", f"{losses[0]:.6f}", f"{losses[-1]:.6f}"),
        bench.cost("adapter"),
    ]


def plain_model(bench: Bench) -> tuple[Any, Any]:
    """Model and tokenizer as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(bench.model)


def nll(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """(L,) negative log-likelihoods of the last message's tokens and its end token, by plain transformers."""
    options = {"return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)["input_ids"]
    ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    ids = ids[:, : int((ids[0] == tokenizer.eos_token_id).nonzero()[-1]) + 1]
    logprobs = model(input_ids=ids[:, :-1]).logits[0, prompt.shape[1] - 1 :].log_softmax(-1)
    return -logprobs.gather(-1, ids[0, prompt.shape[1] :, None])[:, 0]


def ends(values: list[float]) -> tuple[str, str]:
    """The first and the last value."""
    return f"{values[0]:.4f}", f"{values[-1]:.4f}"


def share(values: Any) -> str:
    """The mean as a percentage with its 95 % interval."""
    mean, (low, high) = interval_of(np.array(values), seed=0)
    return f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def interval(result: dict[str, Any]) -> str:
    """The accuracy of an evaluation of pairs, and its margin."""
    low, high = (100 * limit for limit in result["accuracy_interval"])
    return f"{100 * result['accuracy']:.1f} % ({low:.1f} to {high:.1f}), margin {result['margin']:.2f}"


def show(prompts: list[list[dict[str, str]]], *columns: list[list[str]]) -> None:
    """Print the last messages of the first prompts with the answers before and after."""
    for prompt, *texts in list(zip(prompts, *columns, strict=True))[:4]:
        print(f"sample: {prompt[-1]['content']}", *(repr(text[0]) for text in texts), sep=" | ", flush=True)


EXPERIMENTS: dict[str, Callable[[Bench], list[Row]]] = {
    function.__name__: function for function in (grpo, sft, preferences, adapter)
}


def main() -> None:
    """Run the experiments that the command line names, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of data and runs")
    parser.add_argument("--model", required=True, help="hub id or folder of a chat model")
    parser.add_argument("--quick", action="store_true", help="two steps and four held-out rows")
    parser.add_argument("experiments", nargs="*", help=", ".join(EXPERIMENTS))
    arguments = parser.parse_args()
    folder = Path(arguments.model)
    bench = Bench(
        arguments.work.resolve(), str(folder.resolve()) if folder.is_dir() else arguments.model, arguments.quick
    )
    instruct_data.write(bench.work / "data")
    for name in arguments.experiments or EXPERIMENTS:
        print(
            f"\n| {name} | before | after |\n| --- | --- | --- |\n"
            + "\n".join(f"| {' | '.join(row)} |" for row in EXPERIMENTS[name](bench)),
            flush=True,
        )


if __name__ == "__main__":
    main()
