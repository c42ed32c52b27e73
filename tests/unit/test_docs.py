"""What the README and docs/ name is there: files, headings, options, choices, commands; and each task has its page."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from sheeprlhf.apps.arguments import PLAIN_VERBS, VERBS, parse_args
from sheeprlhf.config.compose import Source, check
from sheeprlhf.config.option_lookup import catalogue
from sheeprlhf.config.registry import ROOTS, choices, groups
from tests.faults.test_resume import VARIANTS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
FOLDERS = ("docs", "sheeprlhf", "configs", "tests", "benchmarks", "examples", "tools")
GROUPS = {group for verb in ROOTS for group in groups(verb)}
ENTRIES = list(catalogue())
KEYS = {entry.option.key for entry in ENTRIES}
OF_EXAMPLES = {"model=pythia", "data=questions", "task=focal", "model=oppt"}  # of docs/extending.md, and a typo
# Built beside these pages: not looked at until they are there.
ACKNOWLEDGED = ("SheepRL", "TRL", "DeepSpeed-Chat", "trlX", "Lit-LLaMA", "LitGPT", "minLoRA", "MOSS-RLHF", "DPO")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def inline(page: Path) -> Iterator[str]:
    """What stands between single backticks."""
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind `python sheeprlhf.py` in every code block, comments and placeholders left out."""
    for _, block in FENCE.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|&& )python sheeprlhf\.py (.*)", line.removeprefix("$ ").partition("  #")[0])
            if found:
                yield [word for word in shlex.split(re.sub(r"<[^>]*>", "<>", found[1])) if "<" not in word]


@cache
def problems_of(verb: str, words: tuple[str, ...]) -> list[str]:
    """What is wrong with a command, whatever runs and files there are."""
    if verb in PLAIN_VERBS or verb not in VERBS or verb == "pipeline":  # it has tests of its own
        return []
    split = parse_args(list(words))
    plugins = ("hydra/launcher=", "hydra/sweeper=", "hydra.launcher.", "hydra.sweeper.")
    left_out = ("experiment_dir=", "resume_from=", *plugins)
    overrides = [word for word in split.words if not word.startswith(left_out)]
    source = Source(verb)
    return check(source, overrides, multirun="multirun" in split.values, complete=False)


def anchors(page: Path) -> set[str]:
    """The headings as GitHub links to them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_path_leads_somewhere(page: Path) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    for code in inline(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]+", code) and not (ROOT / code).exists():
            missing.append(code)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_and_choice_that_is_named_exists(page: Path) -> None:
    unknown = []
    for word in (word for words in (*map(str.split, inline(page)), *commands(page)) for word in words):
        if word in OF_EXAMPLES or word.endswith(".py"):
            continue
        key, equals, value = word.rstrip(",;").partition("=")
        group, _, rest = key.partition(".")
        if group in GROUPS | {"generation"} and re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", rest):
            is_part = any(known.startswith(f"{key}.") for known in KEYS)  # model.lora_cfg
            unknown += [] if key in KEYS or is_part else [word]
        elif equals and key in GROUPS and re.fullmatch(r"[a-z_]\w+", value):
            unknown += [] if value in choices(key) else [word]
    assert unknown == []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_code_block_composes(page: Path) -> None:
    problems = []
    for verb, *words in commands(page):
        if verb not in VERBS:
            problems.append(f"no command {verb}")
        elif not set(words) & (OF_EXAMPLES | {"data.train_file=broken.jsonl", "--config-dir"}):
            problems += problems_of(verb, tuple(words))
    assert problems == []


@pytest.mark.parametrize("task", choices("task", "train"))
def test_every_task_has_a_page_with_its_equation_options_and_published_settings(task: str) -> None:
    page = ROOT / "docs" / f"{task}.md"
    text = page.read_text()
    equations = [block for language, block in FENCE.findall(text) if not language]
    assert text.startswith(f"# task={task}: ")
    assert any("=" in block for block in equations)
    parts = ("## Options that matter", "## What to watch", "## Published settings")
    assert [part for part in parts if part not in text] == []
    mine = {entry.option.key for entry in ENTRIES if entry.verb == "train" and entry.choice == task}
    named = {key for code in inline(page) for key in re.findall(r"\btask\.[a-z_]+", code)}
    assert named - mine - {"task.model_name"} == set()
    assert f"]({task}.md)" in (ROOT / "docs" / "README.md").read_text()


def test_the_table_of_algorithms_names_tests_and_covers_every_loss() -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text()
    table = text[text.index("| ---") :]
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", table)
    assert len(named) > 30
    for file, name in named:
        assert re.search(rf"^(def )?{name}\b", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{name}"
    variants = set(re.findall(r"\[([^\]]*)\](?!\()", table))
    assert variants - set(VARIANTS) == set()
    tasks = {task for task in choices("task", "train") if f"({task}.md)" not in table}
    assert tasks == {"sft"}


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


def test_the_readme_has_its_sections_and_thanks() -> None:
    text = (ROOT / "README.md").read_text()
    sections = ("Quick start", "Configurations", "Why", "How", "Usage", "Extending", "Adding models", "LoRA")
    sections += ("Contributing", "Acknowledgements", "Licence")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == list(sections)
    thanks = text.partition("## Acknowledgements")[2].partition("## Licence")[0]
    assert [name for name in ACKNOWLEDGED if f"[{name}]" not in thanks and name not in thanks] == []
    folders = {path.parent.name for path in (ROOT / "sheeprlhf").glob("*/__init__.py")} - {"assets", "utils"}
    assert {name for name in folders if f"`sheeprlhf/{name}`" not in text} == set()
