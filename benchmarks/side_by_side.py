r"""Two frameworks on the same work, in turns, one process at a time; prints a Markdown table of medians.

    python benchmarks/side_by_side.py --cases benchmarks/sft_cases.txt --rounds 3 \
        --ours "python benchmarks/run_sheeprlhf.py --work WORK" \
        --peer "PEER/python PEER/run_trl.py --task sft --work WORK" \
        [--floor "PEER/python PEER/floor.py"] [--lock FILE] [--only NAME]

A line of the cases is `name | options of ours | options of the peer`; they come after the commands' own, so a case may
say which task it is. Each command prints one line `RESULT {json}`, as run_sheeprlhf.py does. The floor is the time that
the useful multiplications take at the machine's peak; its command measures that anew in every round. A lock file keeps
other timings of this machine waiting during each run.
"""

import argparse
import contextlib
import datetime
import fcntl
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEADER = (
    "| case | tokens/s | peer's | times | peak MB | peer's | share | of the floor | peer's | start-up s | peer's "
    "| losses apart |"
)


class Case(NamedTuple):
    """One row of the table."""

    name: str
    ours: str
    peer: str


def read_cases(path: Path, only: str | None) -> list[Case]:
    """The lines of a file; empty ones and those that begin with # are left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    cases = [Case(*(part.strip() for part in line.split("|"))) for line in lines]
    return [case for case in cases if only is None or re.search(only, case.name)]


@contextlib.contextmanager
def held(lock: Path | None) -> Iterator[None]:
    """Inside, nobody else has the lock."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: str, lock: Path | None) -> str:
    """What a command prints.

    Raises:
        SystemExit: it fails.
    """
    with held(lock):
        done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def result_of(command: str, lock: Path | None) -> dict[str, Any]:
    """The RESULT line of a command."""
    lines = [line for line in run(command, lock).splitlines() if line.startswith("RESULT ")]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    which = f"{result['framework']:>10} {result['task']} {result['model']} {result['precision']}"
    print(f"{which}: {result['step_times']}", file=sys.stderr)
    return result


def floors(text: str) -> dict[tuple[str, str, str], float]:
    """Tokens a second at the peak, by model, task and number format, from what the floor's command prints."""
    found = re.findall(r"^(\S+)\s+(\S+) .*fp32 .*?([\d.]+) tok/s .*bf16 .*?([\d.]+) tok/s", text, re.MULTILINE)
    formats = ("fp32", "bf16")
    return {
        (model, task, name): float(n) for model, task, *both in found for name, n in zip(formats, both, strict=True)
    }


def row(case: Case, ours: list[dict[str, Any]], peer: list[dict[str, Any]], floor: list[float]) -> str:
    """One line of the table."""
    memory = "peak_cuda_mb" if "peak_cuda_mb" in ours[0] else "peak_rss_mb"

    def median(results: list[dict[str, Any]], key: str) -> float:
        return statistics.median(result[key] for result in results)

    speed, memories, starts = ([median(r, key) for r in (ours, peer)] for key in ("tokens_per_s", memory, "startup_s"))
    shares = [f"{n / statistics.median(floor):.0%}" if floor else "" for n in speed]
    apart = max(abs(a - b) for a, b in zip(ours[0]["losses"], peer[0]["losses"], strict=False))
    return (
        f"| {case.name} | {speed[0]:,.0f} | {speed[1]:,.0f} | **{speed[0] / speed[1]:.2f}** "
        f"| {memories[0]:,.0f} | {memories[1]:,.0f} | **{memories[0] / memories[1]:.2f}** "
        f"| {shares[0]} | {shares[1]} | {starts[0]:.1f} | {starts[1]:.1f} | {apart:.4f} |"
    )


def split(result: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds an update of a result with `parts_s`: sampling, scoring (reference, critic, reward), the rest.

    TRL's "score" of RLOO and GRPO has the sampling in it.
    """
    parts, number = result["parts_s"], len(result["step_times"])
    sampling = parts["generate"]
    scoring = parts["score"] - sampling if "score" in parts else parts["ref"] + parts["value_reward"]
    return sampling / number, scoring / number, (result["seconds"] - sampling - scoring) / number


def print_split(
    cases: list[Case], ours: dict[str, list[dict[str, Any]]], peer: dict[str, list[dict[str, Any]]]
) -> None:
    """Where the time of an update goes, for cases that have rollouts."""
    print("\n| case | sampling s | peer's | scoring s | peer's | update s | peer's |\n|" + " --- |" * 7)
    for case in cases:
        medians = [
            [statistics.median(part) for part in zip(*map(split, results[case.name]), strict=True)]
            for results in (ours, peer)
        ]
        cells = [f"{a:.2f} | {b:.2f}" for a, b in zip(*medians, strict=True)]
        print(f"| {case.name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Run all cases `rounds` times, ours and the peer's in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--ours", required=True, help="command, to which a case's options are added")
    parser.add_argument("--peer", required=True, help="the same for the other framework")
    parser.add_argument("--floor", help="command that prints the floors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--only", help="cases whose name has this regular expression")
    args = parser.parse_args()
    cases = read_cases(args.cases, args.only)
    ours: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    peer: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    measured: list[dict[tuple[str, str, str], float]] = []
    for number in range(args.rounds):
        if args.floor:
            measured.append(floors(run(args.floor, args.lock)))
        for case in cases:
            turns = [(ours, f"{args.ours} {case.ours}"), (peer, f"{args.peer} {case.peer}")]
            for results, command in turns if number % 2 == 0 else turns[::-1]:
                results[case.name].append(result_of(command, args.lock))
    versions = " and ".join(
        f"{r[cases[0].name][0]['framework']} {r[cases[0].name][0]['version']}" for r in (ours, peer)
    )
    print(f"{datetime.date.today()}, {versions}, {platform.machine()}, median of {args.rounds} rounds")
    print(f"\n{HEADER}\n|{' --- |' * 12}")
    for case in cases:
        first = ours[case.name][0]
        kind = first["model"], first["task"], first["precision"].removesuffix("-mixed")
        print(row(case, ours[case.name], peer[case.name], [floor[kind] for floor in measured if kind in floor]))
    with_rollouts = [case for case in cases if "parts_s" in ours[case.name][0]]
    if with_rollouts:
        print_split(with_rollouts, ours, peer)


if __name__ == "__main__":
    main()
