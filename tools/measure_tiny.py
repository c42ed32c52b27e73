"""Measure the embedded model against its gates, on packages never trained on (test split of ``data=docstrings``).

Usage: ``python -m tools.measure_tiny --model FOLDER --output card.json [--seeds 0 1 2]``

Bits per character: the bits of all tokens of the summaries, each one's EOS included, given the signature, divided by
the characters of the summaries' texts; as the model is, and after fine-tuning on all 20,000 training rows (mean over
seeds). Words: the share of sampled words (one response a row, at each of ``TEMPERATURES``) that are in the English
list of ``words/NOTICE`` or in the row's signature; a word is a run of two or more letters. The share with the jargon
of the training split (words of at least two packages) is told beside. ROUGE-L: of greedy responses after fine-tuning,
beside that of the signature's class and function names as words.

Everything is run by the framework's own commands. What a seed has finished, of the same weights, is not run again; an
interrupted fine-tuning goes on. Delete the work folder to begin anew.
"""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from sheeprlhf.cli import run
from sheeprlhf.engine.rundir import is_finished
from sheeprlhf.utils.home import EMBEDDED, embedded_folder
from tools.english import english_words, jargon, unknown_words, words_of

DATA = ("data=docstrings", "data.num_samples=null", "data.reward_model_split=0")  # all 20,000 rows
MAX_BITS, MIN_WORDS = 1.5, 0.95
TEMPERATURES = (1.0, 0.7)  # the model's own distribution, and that of the usual rollouts (arXiv 2403.17031, detail 9)


class Sampled(NamedTuple):
    """Words that a fine-tuned model samples at one temperature.

    Attributes:
        temperature: of the softmax.
        known: share of the words that are English or in the signature.
        with_jargon: share of those that are English, in the signature or jargon.
        words: number of words.
        unknown: the words that are none of these, most frequent first.
    """

    temperature: float
    known: float
    with_jargon: float
    words: int
    unknown: list[str]


class Seed(NamedTuple):
    """Score of one fine-tuned model.

    Attributes:
        bits_per_character: of the summaries given the signature.
        perplexity: of a summary's token.
        rouge_l: of greedy responses, times 100.
        names_rouge_l: of the signatures' names as words, times 100.
        sampled: what it samples, at each of `TEMPERATURES`.
        authors_known: share of the authors' words that are English or in the signature.
        authors_with_jargon: share of those that are English, in the signature or jargon.
    """

    bits_per_character: float
    perplexity: float
    rouge_l: float
    names_rouge_l: float
    sampled: list[Sampled]
    authors_known: float
    authors_with_jargon: float


class Gate(NamedTuple):
    """One requirement and whether it holds."""

    name: str
    limit: str
    figure: str
    passed: bool


def evaluated(words: list[str], result: Path) -> dict[str, Any]:
    """The JSON of an evaluation, which is run only if it is not there yet."""
    if not result.is_file():
        run(["eval", *words])
    numbers: dict[str, Any] = json.loads(result.read_text())
    return numbers


def known_share(rows: list[dict[str, str]], key: str, known: frozenset[str]) -> tuple[float, int, Counter[str]]:
    """Share of the words of `row[key]` that are known or in `row["prompt"]`, their number, and the others."""
    number = sum(len(words_of(row[key])) for row in rows)
    unknown = Counter(word for row in rows for word in unknown_words(row[key], row["prompt"], known))
    return 1.0 - unknown.total() / max(1, number), number, unknown


def measure_seed(model: str, seed: int, folder: Path, sft: list[str]) -> Seed:
    """Fine-tune with one seed and evaluate; `folder` keeps the run."""
    if not is_finished(folder):
        start = ["train", "task=sft", "model=tiny", f"model.repo_name={model}", *DATA, "task.num_sample_prompts=0"]
        run([*start, *sft, f"seed={seed}", f"hydra.run.dir={folder}", "resume=true"])
    of_run = [f"experiment_dir={folder}", f"seed={seed}"]
    losses = evaluated(["task=perplexity", *of_run], folder / "eval" / "perplexity-test-final.json")
    rouge = evaluated(["task=rouge", *of_run], folder / "eval" / "rouge-test-final.json")
    sampled = [measure_words(folder, seed, temperature) for temperature in TEMPERATURES]
    rows = read_rows(folder / "eval" / "rouge-test-final.jsonl")
    return Seed(
        bits_per_character=losses["bits_per_character"],
        perplexity=losses["perplexity"],
        rouge_l=rouge["rougeL"],
        names_rouge_l=rouge["mean_low_high"]["names"]["rougeL"][0],
        sampled=sampled,
        authors_known=known_share(rows, "reference", english_words())[0],
        authors_with_jargon=known_share(rows, "reference", english_words() | jargon())[0],
    )


def measure_words(folder: Path, seed: int, temperature: float) -> Sampled:
    """Sample a response for each row of the test split from the fine-tuned model in `folder`."""
    result = folder / f"sampled-{temperature}" / "rouge-test-tiny.json"
    options = [f"generation.temperature={temperature}", "generation.do_sample=true", f"seed={seed}"]
    words = ["task=rouge", "model=tiny", f"model.repo_name={folder / 'final'}", *DATA, *options]
    evaluated([*words, f"output_dir={result.parent}"], result)
    rows = read_rows(result.with_suffix(".jsonl"))
    with_jargon, number, unknown = known_share(rows, "response", english_words() | jargon())
    known = known_share(rows, "response", english_words())[0]
    return Sampled(temperature, known, with_jargon, number, [word for word, _ in unknown.most_common(40)])


def read_rows(path: Path) -> list[dict[str, str]]:
    """The texts that an evaluation kept."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def gates(seeds: list[Seed]) -> list[Gate]:
    """The gates of the fine-tuned models, each by its mean over the seeds; none without a seed."""
    if not seeds:
        return []
    bits = mean(s.bits_per_character for s in seeds)
    rouge_l, names = mean(s.rouge_l for s in seeds), mean(s.names_rouge_l for s in seeds)
    found = [Gate("bits per character after SFT", f"at most {MAX_BITS}", f"{bits:.3f}", bits <= MAX_BITS)]
    for at in zip(*(s.sampled for s in seeds), strict=True):
        known, name = mean(s.known for s in at), f"known words after SFT, sampled at {at[0].temperature}"
        found.append(Gate(name, f"at least {MIN_WORDS:.0%}", f"{known:.2%}", known >= MIN_WORDS))
    return [
        *found,
        Gate("ROUGE-L after SFT", f"above the names' {names:.2f}", f"{rouge_l:.2f}", rouge_l > names),
    ]


def measure(model: str, seeds: list[int], work: Path, sft: list[str]) -> dict[str, Any]:
    """All figures, for JSON. `work` is shared by models: a folder of it belongs to these weights and SFT options."""
    folder = embedded_folder(model) if model.startswith(EMBEDDED) else Path(model).absolute()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    place = (work / hashlib.sha256(" ".join([digest, *sft]).encode()).hexdigest()[:12]).absolute()
    words = ["task=perplexity", "model=tiny", f"model.repo_name={folder}", *DATA, f"output_dir={place}"]
    before = evaluated(words, place / "perplexity-test-tiny.json")
    measured = [measure_seed(str(folder), seed, place / f"seed-{seed}", sft) for seed in seeds]
    return {
        "weights_sha256": digest,
        "sft_options": sft,
        "seeds": seeds,
        **{key: before[key] for key in ("rows", "tokens", "characters", "bits_per_character", "perplexity")},
        "after_sft": [seed._asdict() | {"sampled": [s._asdict() for s in seed.sampled]} for seed in measured],
        "gates": [gate._asdict() for gate in gates(measured)],
    }


def main() -> None:
    """Measure, print the gates and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:tiny", help="folder of the model, or embedded:tiny")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the fine-tunings; none is quick")
    parser.add_argument("--work", type=Path, default=Path("logs/measure_tiny"), help="folder that keeps the runs")
    parser.add_argument("--sft", nargs="*", default=[], metavar="KEY=VALUE", help="further options of train task=sft")
    args = parser.parse_args()
    figures = measure(args.model, args.seeds, args.work, args.sft)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    table = Table("gate", "limit", "figure", "", title=f"{args.model}, seeds {args.seeds}")
    table.add_row("bits per character before SFT", "", f"{figures['bits_per_character']:.3f}", "")
    for gate in figures["gates"]:
        table.add_row(gate["name"], gate["limit"], gate["figure"], "pass" if gate["passed"] else "FAIL")
    Console().print(table)
    print(f"saved: {args.output}")


if __name__ == "__main__":
    main()
