"""Make the embedded model of a finished pretraining run: its weights in float16, and a card with its figures.

Usage: ``python -m tools.build_tiny --run RUN --output DIR [--measured JSON]``

RUN is a run of ``experiment=pretrain_tiny``. The card is written when the weights have been measured: JSON is what
``python -m tools.measure_tiny --model DIR --output JSON`` made of them.
"""

import argparse
import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

CURVE_POINTS = 12

CARD = """# tiny: the embedded model of SheepRLHF

A llama-shaped causal language model of {parameters:,} parameters (width 256, 6 layers, 4 heads, 512 positions, tied
embeddings) with a byte-level BPE tokenizer of 4,096 tokens, stored in float16. It is there so that every command of
SheepRLHF runs offline on a CPU; it is not good at anything else.

## How it was made
By this framework, from random weights: `python sheeprlhf.py train experiment=pretrain_tiny data.train_file=<corpus>`,
all tokens trained on, rows packed. `python -m tools.build_docstrings --corpus <folder>` makes the corpus:
signatures with their docstrings, and short functions, of permissively licensed Python packages and the standard
library; none of the packages of the validation and test splits of `data=docstrings` is in it. Its sources are those
named in `../docstrings/NOTICE`.

| | |
| --- | --- |
| rows, tokens an epoch | {rows:,} rows, {epoch_tokens:,} response tokens |
| optimizer steps, rows a step | {steps:,}, {rows_per_step} |
| tokens trained on | {tokens:,} |
| learning rate | {lr}, cosine, {warmup} steps of warm-up |
| precision, device | {precision}, {accelerator} |

## Figures
| | |
| --- | --- |
| held-out perplexity of a token, all tokens, packages never trained on | {perplexity:.2f} |
| perplexity of a summary's token given its signature, test split of `data=docstrings` | {summary_perplexity:.2f} |
| bits per character of those summaries | {bits_per_character:.3f} |

### After supervised fine-tuning
`python sheeprlhf.py train task=sft data.num_samples=null data.reward_model_split=0{sft_options}`: all 20,000 training
rows, then measured on the {summaries:,} summaries of the test split ({characters:,} characters), whose packages neither
the corpus nor the fine-tuning has. Gates, each for the mean over the seeds:

| gate | limit | figure | |
| --- | --- | --- | --- |
{gates}

| seed | bits per character | perplexity of a token | ROUGE-L, greedy | known words, with jargon, at {temperatures} |
| --- | --- | --- | --- | --- |
{seeds}

- Bits per character: bits of all tokens of the summaries, each one's EOS included, divided by the characters of their
  texts.
- Known words: one response a row; share of its runs of two or more letters that are in an English list of 73,506 words
  (`../words/NOTICE`) or in the row's signature, whole or cut at camel case. Of the authors' own words {authors:.1%}
  are. With jargon (words in the training summaries of at least two packages, such as "tuple") it is
  {authors_with_jargon:.1%} of the authors' words; the model's commonest others at temperature 1: {unknown}.
- ROUGE-L: F-measure x 100 of rouge-score, without stemming. The names of the signature's class and function as words
  get {names:.2f}.

### Pretraining
Training loss (nats a token):

| step | loss |
| --- | --- |
{curve}

What it wrote for three held-out prompts at the last step:

```
{samples}
```

## What it cannot do
It has seen nothing but Python docstrings and short functions. It knows no facts, writes no correct code, and repeats
itself. Text in other languages or domains is gibberish to it. Do not use it for anything but trying out SheepRLHF.
"""


def read_curve(metrics: Path, tag: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of one tag of a run's metrics.csv."""
    with metrics.open(newline="") as file:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["tag"] == tag]


def write_card(run: Path, measured: dict[str, Any], parameters: int) -> str:
    """The model card of a finished run, from its own records and what `measure_tiny` found."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    report = json.loads((run / "data_report.json").read_text())["splits"]["train"]
    losses = read_curve(run / "metrics.csv", "train/loss")
    shown = losses[:: max(1, len(losses) // CURVE_POINTS)]
    state = json.loads((run / "checkpoints" / f"step-{losses[-1][0]}" / "state.json").read_text())
    samples = (run / "samples" / f"step-{losses[-1][0]}.txt").read_text().split("\n", 1)[1]
    seeds = measured["after_sft"]
    return CARD.format(
        parameters=parameters,
        rows=report["kept"],
        epoch_tokens=report["trained_tokens"],
        steps=losses[-1][0],
        rows_per_step=config["task"]["mini_batch_size"],
        tokens=state["items_seen"],
        lr=config["optim"]["lr"],
        warmup=config["task"]["lr_warmup_steps"],
        precision=config["fabric"]["precision"],
        accelerator=config["fabric"]["accelerator"],
        perplexity=read_curve(run / "metrics.csv", "val/perplexity")[-1][1],
        summary_perplexity=measured["perplexity"],
        bits_per_character=measured["bits_per_character"],
        summaries=measured["rows"],
        characters=measured["characters"],
        sft_options="".join(f" {option}" for option in measured["sft_options"]),
        gates="\n".join(
            f"| {gate['name']} | {gate['limit']} | {gate['figure']} | {'met' if gate['passed'] else 'not met'} |"
            for gate in measured["gates"]
        ),
        seeds="\n".join(
            f"| {number} | {seed['bits_per_character']:.3f} | {seed['perplexity']:.2f} | {seed['rouge_l']:.2f} | "
            + "; ".join(f"{at['known']:.2%}, {at['with_jargon']:.2%}" for at in seed["sampled"])
            + " |"
            for number, seed in zip(measured["seeds"], seeds, strict=True)
        ),
        temperatures="; ".join(str(at["temperature"]) for at in seeds[0]["sampled"]),
        authors=seeds[0]["authors_known"],
        authors_with_jargon=seeds[0]["authors_with_jargon"],
        unknown=", ".join(seeds[0]["sampled"][0]["unknown"][:12]),
        names=seeds[0]["names_rouge_l"],
        curve="\n".join(f"| {step} | {loss:.3f} |" for step, loss in shown),
        samples=samples.strip(),
    )


def main() -> None:
    """Write model.safetensors and config.json of the embedded model, and README.md once it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory of the finished run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the embedded model")
    parser.add_argument("--measured", type=Path, help="JSON of measure_tiny for these weights, with at least one seed")
    args = parser.parse_args()
    weights = load_file(args.run / "final" / "model.safetensors")
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}
    model = args.output / "model.safetensors"
    save_file(half, model, metadata={"format": "pt"})
    config = json.loads((args.output / "config.json").read_text()) | {"dtype": "float16"}
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if args.measured is not None:
        measured = json.loads(args.measured.read_text())
        if not measured["seeds"]:
            parser.error(f"--measured={args.measured} has no seed: measure with --seeds 0 1 2")
        if measured["weights_sha256"] != hashlib.sha256(model.read_bytes()).hexdigest():
            parser.error(f"--measured={args.measured} is of other weights than {model}: measure these")
        card = write_card(args.run, measured, sum(tensor.numel() for tensor in half.values()))
        (args.output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
