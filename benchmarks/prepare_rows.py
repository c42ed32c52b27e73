"""How fast data is prepared, and in how much memory, as it grows: prints one line `RESULT {json}` for each size.

    python benchmarks/prepare_rows.py --rows 10000 1000000 [--num-proc 1]

Makes a jsonl file of random words (about 190 bytes a row, all different) and prepares it with the embedded tokenizer,
each size in a fresh process and an empty cache. Seconds are those of `prepare_data`: hashing the file, reading,
tokenising, writing, report; `cpu_seconds` those of them that it computed. `before_mb` is the process's memory before,
imports and tokenizer loaded; `peak_mb` its peak. With several processes, `workers_mb` is the peak of the largest one.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEED = 0


def main() -> None:
    """Measure every size, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--num-proc", type=int, default=1, help="data.num_proc")
    parser.add_argument("--folder", type=Path, help="where the files go, kept; by default a temporary folder, removed")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)  # what the fresh process does
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare, args.num_proc)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for count in args.rows:
            file = folder / f"{count}.jsonl"
            if not file.exists():
                write_rows(file, count)
            command = [sys.executable, __file__, "--num-proc", str(args.num_proc), "--prepare", str(file)]
            subprocess.run(command, check=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})


def write_rows(file: Path, count: int) -> None:
    """Rows of 8 to 24 words to read and 4 to 12 to learn, from a vocabulary of 5,000."""
    rng = random.Random(SEED)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkqjxz", k=rng.randint(2, 9))) for _ in range(5_000)]
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            prompt = " ".join(rng.choices(words, k=rng.randint(8, 24)))
            response = " ".join(rng.choices(words, k=rng.randint(4, 12)))
            stream.write(json.dumps({"prompt": prompt + ":", "response": f" {response}."}) + "\n")


def prepare(file: Path, num_proc: int) -> None:
    """Prepare one file and print the figures."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from sheeprlhf.data.prepare import prepare_data
    from sheeprlhf.model.folder.load import load_tokenizer
    from sheeprlhf.structure.data import LocalDataConfig
    from sheeprlhf.structure.model import TinyConfig

    tokenizer = load_tokenizer(TinyConfig())
    before = peak_mb(resource.RUSAGE_SELF)
    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        cfg = LocalDataConfig(train_file=str(file), num_proc=num_proc, cache_dir=cache)
        start, cpu_start = time.perf_counter(), cpu_time()
        data = prepare_data(cfg, tokenizer, kind="sft", say=print, progress=True)
        seconds = time.perf_counter() - start
        cpu_seconds = cpu_time() - cpu_start
    counts = data.report["splits"].values()
    rows = sum(part["read"] for part in counts)
    result = {
        "rows": rows,
        "kept": sum(part["kept"] for part in counts),
        "file_mb": round(file.stat().st_size / 2**20, 1),
        "tokens": sum(int(split.lengths.sum()) for split in data.splits.values()),
        "num_proc": num_proc,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "rows_per_s": round(rows / seconds),
        "rows_per_cpu_s": round(rows / cpu_seconds),
        "before_mb": round(before),
        "peak_mb": round(peak_mb(resource.RUSAGE_SELF)),
        "workers_mb": round(peak_mb(resource.RUSAGE_CHILDREN)),
    }
    print("RESULT " + json.dumps(result), flush=True)


def cpu_time() -> float:
    """Seconds of processor time of this process and its ended children: other work on the machine counts little."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak_mb(who: int) -> float:
    """Peak resident memory so far, of this process or of its largest ended child."""
    return resource.getrusage(who).ru_maxrss / 1024


if __name__ == "__main__":
    main()
