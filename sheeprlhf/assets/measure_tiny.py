"""Measure the embedded model against its gates, on packages never trained on (test split of ``data=docstrings``).

Usage: ``python -m sheeprlhf.assets.measure_tiny --model FOLDER --output card.json [--seeds 0 1 2]``

Bits per character: the bits of all tokens of the summaries, each one's EOS included, given the signature, divided by
the characters of the summaries' texts; as the model is, and after fine-tuning on all 20,000 training rows (mean over
seeds). Words: the share of sampled words (temperature 1, one response a row) that are in the English list of
``words/NOTICE`` or in the row's signature; a word is a run of two or more letters. The share with the jargon of the
training split (words of at least two packages) is told beside. ROUGE-L: of greedy responses after fine-tuning, beside
that of the signature's class and function names as words.

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

from sheeprlhf.assets.english import english_words, jargon, unknown_words, words_of
from sheeprlhf.cli import run
from sheeprlhf.engine.rundir import is_finished
from sheeprlhf.utils.hub import EMBEDDED, embedded_folder

DATA = ("data=docstrings", "data.num_samples=null", "data.reward_model_split=0")  # all 20,000 rows
MAX_BITS, MIN_WORDS = 1.5, 0.95


class Seed(NamedTuple):
    """What one fine-tuned model scores.

    Attributes:
        bits_per_character: of the summaries given the signature.
        perplexity: of a summary's token.
        rouge_l: of greedy responses, times 100.
        names_rouge_l: of the signatures' names as words, times 100.
        known_words: share of the sampled words that are English or in the signature.
        authors_known_words: the same of the authors' words.
        with_jargon: share of the sampled words that are English, in the signature or jargon.
        authors_with_jargon: the same of the authors' words.
        sampled_words: number of words sampled.
        unknown: the sampled words that are none of these, most frequent first.
    """

    bits_per_character: float
    perplexity: float
    rouge_l: float
    names_rouge_l: float
    known_words: float
    authors_known_words: float
    with_jargon: float
    authors_with_jargon: float
    sampled_words: int
    unknown: list[str]


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
    sampled = folder / "sampled" / "rouge-test-tiny.jsonl"
    words = ["model=tiny", f"model.repo_name={folder / 'final'}", *DATA, "generation.do_sample=true", f"seed={seed}"]
    evaluated(["task=rouge", *words, f"output_dir={sampled.parent}"], sampled.with_suffix(".json"))
    rows = [json.loads(line) for line in sampled.read_text().splitlines()]
    english = english_words()
    known = english | jargon()
    with_jargon, number, unknown = known_share(rows, "response", known)
    return Seed(
        bits_per_character=losses["bits_per_character"],
        perplexity=losses["perplexity"],
        rouge_l=rouge["rougeL"],
        names_rouge_l=rouge["mean_low_high"]["names"]["rougeL"][0],
        known_words=known_share(rows, "response", english)[0],
        authors_known_words=known_share(rows, "reference", english)[0],
        with_jargon=with_jargon,
        authors_with_jargon=known_share(rows, "reference", known)[0],
        sampled_words=number,
        unknown=[word for word, _ in unknown.most_common(40)],
    )


def gates(seeds: list[Seed]) -> list[Gate]:
    """The gates of the fine-tuned models, each by its mean over the seeds; none without a seed."""
    if not seeds:
        return []
    bits, known = mean(s.bits_per_character for s in seeds), mean(s.known_words for s in seeds)
    rouge_l, names = mean(s.rouge_l for s in seeds), mean(s.names_rouge_l for s in seeds)
    return [
        Gate("bits per character after SFT", f"at most {MAX_BITS}", f"{bits:.3f}", bits <= MAX_BITS),
        Gate("sampled words known after SFT", f"at least {MIN_WORDS:.0%}", f"{known:.2%}", known >= MIN_WORDS),
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
        "after_sft": [seed._asdict() for seed in measured],
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
