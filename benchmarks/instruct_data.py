"""Synthetic conversations for `instruct.py`: word problems with a reward, facts to recall, and preferred answers.

    python benchmarks/instruct_data.py FOLDER

Each set has a training and a test file. They depend on nothing, and no row of a test file is in a training file.
"""

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stones", "tickets")
PLUS = ("gets {} more", "buys {} more", "finds {} more")
MINUS = ("gives away {}", "loses {}", "sells {}")
EXAMPLES = (
    *("Tom has 9 pens and gives away 4. How many?", "9 - 4 = 5"),
    *("Lisa has 3 eggs and gets 4 more. How many?", "3 + 4 = 7"),
)
NUMBER = re.compile(r"\d+")


def chat(system: str, *texts: str) -> list[dict[str, str]]:
    """A system message, then messages of user and assistant in turn."""
    roles = ["system", *(("user", "assistant")[number % 2] for number in range(len(texts)))]
    return [{"role": role, "content": text} for role, text in zip(roles, (system, *texts), strict=True)]


def problem(rng: random.Random, steps: int, largest: int = 20) -> Row:
    """A word problem of this many additions and subtractions; no result is negative."""
    total = rng.randint(2, largest)
    clauses = [f"{rng.choice(NAMES)} has {total} {rng.choice(THINGS)}"]
    for _ in range(steps):
        plus = total < 3 or rng.random() < 0.5
        number = rng.randint(2, largest if plus else min(total, largest))
        total += number if plus else -number
        clauses.append(rng.choice(PLUS if plus else MINUS).format(number))
    question = f"{', '.join(clauses[:-1])} and {clauses[-1]}. How many?"
    return {"prompt": chat("Write an equation.", *EXAMPLES, question), "answer": total}


def correct(responses: list[str], answer: list[int]) -> list[float]:
    """Reward: 1 for a response whose last number is the answer, else 0."""
    numbers = [NUMBER.findall(response) for response in responses]
    return [float(bool(found) and int(found[-1]) == right) for found, right in zip(numbers, answer, strict=True)]


FACTS = {
    "name": NAMES,
    "city": ("Berlin", "Cairo", "Lima", "London", "Madrid", "Oslo", "Paris", "Rome", "Tokyo", "Vienna"),
    "job": ("baker", "cook", "doctor", "driver", "farmer", "lawyer", "nurse", "painter", "pilot", "teacher"),
    "color": ("black", "blue", "brown", "gold", "green", "grey", "orange", "pink", "red", "white"),
    "sport": ("boxing", "chess", "cycling", "football", "golf", "hockey", "running", "skiing", "surfing", "tennis"),
    "drink": ("beer", "cocoa", "coffee", "juice", "lemonade", "milk", "soda", "tea", "water", "wine"),
}
UNHELPFUL = ("I just read it. Look it up yourself.", "Why do you ask me? That is not my problem.", "Find out yourself.")


def facts(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Different keys, each with a value."""
    return [(key, rng.choice(FACTS[key])) for key in rng.sample(list(FACTS), count)]


def recall(rng: random.Random) -> Row:
    """Two facts, each acknowledged in a fixed form, and a question about one of them."""
    told = facts(rng, 2)
    turns = [text for key, value in told for text in (f"My {key} is {value}.", f"Noted: {key} = {value}.")]
    key, value = rng.choice(told)
    return {"messages": chat("Remember the facts.", *turns, f"What is my {key}?", f"Recall: {key} = {value}.")}


def preference(rng: random.Random, kind: str | None = None) -> Row:
    """A question about a fact of the conversation: a correct, polite answer, and a "wrong" or an "unhelpful" one."""
    (key, value), (other, second) = facts(rng, 2)
    told = f"My {key} is {value} and my {other} is {second}."
    prompt = chat("Answer politely.", told, "Thank you, I will remember that.", f"What is my {key}?")
    answer, rejected = "Your {} is {}. Happy to help!", rng.choice(UNHELPFUL)
    if (kind or rng.choice(("wrong", "unhelpful"))) == "wrong":
        rejected = answer.format(key, rng.choice([one for one in FACTS[key] if one != value]))
    answers = {"chosen": answer.format(key, value), "rejected": rejected}
    return {"prompt": prompt} | {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}


SETS: dict[str, tuple[int, Callable[[random.Random], Row]]] = {  # test sets first: their rows leave the training sets
    "problems-test": (256, lambda rng: problem(rng, 1)),
    "problems-hard": (256, lambda rng: problem(rng, 2)),
    "problems-train": (1200, lambda rng: problem(rng, 1)),
    "recall-test": (24, recall),
    "recall-train": (400, recall),
    "preference-wrong": (24, lambda rng: preference(rng, "wrong")),
    "preference-unhelpful": (24, lambda rng: preference(rng, "unhelpful")),
    "preference-train": (400, preference),
}


def write(folder: Path) -> None:
    """Write all sets as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for name, (count, make) in SETS.items():
        rng, lines = random.Random(name), list[str]()
        while len(lines) < count:
            line = json.dumps(make(rng))
            if line not in seen:
                seen.add(line)
                lines.append(line)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
