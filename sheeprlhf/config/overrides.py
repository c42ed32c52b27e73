"""Check the overrides of a command line."""

import contextlib
import re
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sheeprlhf.config.command_words import hydra_value, option_word, parse_word, shell_word
from sheeprlhf.config.option_checks import did_you_mean, nearest
from sheeprlhf.config.option_lookup import entries_of, meant_by, owners_of
from sheeprlhf.config.registry import (
    ROOTS,
    choices,
    current_word,
    groups,
    options,
    twice_given,
    type_hints,
    typed_with_missing,
    unwrap_optional,
)
from sheeprlhf.security.redaction import CREDENTIAL_ADVICE, is_secret_name, is_secret_value


class Chosen(NamedTuple):
    """A job's overrides by kind: good choices of groups, Hydra's own, values; and what is wrong with the choices."""

    available: dict[str, list[str]]
    groups: list[Override]
    hydra: list[Override]
    values: list[Override]
    failed: set[str]  # groups whose choice does not exist: nothing else is said about their options
    problems: list[str]


def readable(words: list[str]) -> tuple[list[Override], list[str]]:
    """The overrides that can be parsed and carry no credential; a problem for each of the others."""
    parsed, problems = [], list(twice_given([word.partition("=")[0].lstrip("+~") for word in words]))
    for word in map(current_word, words):
        key, _, value = word.partition("=")
        if not key:
            problems.append(f"{_short(word)} has no key: write key=value, for example seed=1")
            continue
        if is_secret_value(word):
            problems.append(f"{key if value and not is_secret_value(key) else 'a word'}: {CREDENTIAL_ADVICE}")
            continue
        override = parse_word(word)
        name = key if override is None else override.key_or_group
        if is_secret_name(name) and (override is None or not _is_option(name)):
            problems.append(f"{name}: {CREDENTIAL_ADVICE}")
        elif override is None:
            problems.append(_unreadable(word, key, value))
        else:
            parsed.append(override)
    return parsed, problems


def _is_option(key: str) -> bool:
    """True if some configuration has this key: an option of this program is not a credential."""
    return key.endswith(".config_name") or any(entries_of(key))


def _is_list_of_texts(key: str) -> bool:
    return any(entry.option.type == list[str] for entry in entries_of(key))


def _is_text(key: str) -> bool:
    return any(unwrap_optional(entry.option.type)[0] is str for entry in entries_of(key))


def quote_texts(word: str) -> str:
    """A word whose text or list items are quoted where Hydra would refuse them, or read numbers instead of texts.

    A text with a comma may be a sweep, one that begins with a quote or a bracket has a mistake: both stay as they are.
    """
    key, _, value = word.partition("=")
    if value.startswith("[") and value.endswith("]"):
        result = _with_quoted_items(key, value)
    elif value and value[0] not in "[{'\"" and "," not in value and _needs_quotes(word, key, value):
        result = option_word(key, value)
    else:
        return word
    return word if parse_word(result) is None else result


def _needs_quotes(word: str, key: str, value: str) -> bool:
    """True if Hydra cannot read a text, or would write it otherwise: the number 1e3 as 1000.0, 2024_01 as 202401."""
    override = parse_word(word)
    if override is None:
        return True
    number = override.value()
    return type(number) in (int, float) and str(number) != value and _is_text(key)


def _with_quoted_items(key: str, value: str) -> str:
    items, texts = _split_items(value[1:-1]), _is_list_of_texts(key)
    if items is None or (not texts and parse_word(f"{key}={value}") is not None):
        return f"{key}={value}"
    kind = str if texts else object
    quoted = [item if _reads_as(item, kind) else hydra_value(item.replace("\\,", ",")) for item in items]
    return f"{key}=[{','.join(quoted)}]"


def _split_items(text: str) -> list[str] | None:
    """The items of a list, at commas outside of quotes and brackets; None if a quote or a bracket stays open."""
    items, start, quote, depth, place = [], 0, "", 0, 0
    while place < len(text):
        letter, before = text[place], text[start:place].strip()
        if letter == "\\":
            place += 1
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not before:
            quote = letter
        elif letter in "[{" and (depth or not before):
            depth += 1
        elif letter in "]}" and depth:
            depth -= 1
        elif letter == "," and not depth:
            items.append(text[start:place].strip())
            start = place + 1
        place += 1
    if quote or depth:
        return None
    return [*items, text[start:].strip()] if text.strip() else []


def _reads_as(item: str, kind: type) -> bool:
    """True if Hydra reads an item of a list as a value of this kind."""
    found = parse_word(f"key=[{item}]")
    value = None if found is None else found.value()
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], kind)


def _unreadable(word: str, key: str, value: str) -> str:
    if value and (value.startswith("[") or _is_list_of_texts(key)):
        items = [item.strip().strip("\"'") for item in value.strip("[]").split(",")]
        return f"{_short(word)} cannot be read: write the list with each text in quotes, {shell_word(key, items)}"
    if value:
        return f"{_short(word)} cannot be read: for one text, quote it, {shell_word(key, value)}"
    if word in ROOTS:
        return f"{word} is a command: give one command, at the start"
    meant = ["--help"] if word == "help" else meant_by(word)
    if meant:
        return f"{_short(word)} is not key=value: did you mean {' or '.join(meant)}?"
    return f"{_short(word)} is not key=value: options are written without dashes and spaces, for example seed=1"


def pick_groups(parsed: list[Override], available: dict[str, list[str]]) -> Chosen:
    """Sort a job's overrides by kind and check the choices of groups against those that exist."""
    chosen = Chosen(available, [], [], [], set(), [])
    for override in parsed:
        key = override.key_or_group
        if key.split(".")[0].split("/")[0].split("@")[0] == "hydra":
            chosen.hydra.append(override)
        elif key not in available or override.package is not None:
            chosen.values.append(override)
        else:
            problem = _choice_problem(override, available[key])
            if problem is None:
                chosen.groups.append(override)
            else:
                chosen.failed.add(key)
                chosen.problems.append(problem)
    return chosen


def _choice_problem(override: Override, names: list[str]) -> str | None:
    """The problem of choosing one of `names` for a group; None if there is none."""
    key = override.key_or_group
    listed = f"it may be {', '.join(names) if names else 'nothing here: there are no files for it'}"
    if override.is_delete():
        return f"~{key} cannot be removed: {listed}"
    value = override.value()
    if override.is_add():
        return f"+{key}={value}: {key} is there already; write {key}={value}"
    if override.is_sweep_override():
        return _sweep_problem(override, is_text=False)
    name = value if isinstance(value, str) else ""
    if name in names:
        return None
    if key == "experiment":
        owner = recipe_owner(name)
    else:
        owner = next((other for other in ROOTS if key in groups(other) and name in choices(key, other)), None)
    if owner is not None:
        return f"{key}={value} belongs to `{owner}`: write {owner} {key}={value}; here {listed}"
    did = did_you_mean(name, names, listed, key=f"{key}=")
    return f"{_short(override.input_line)} is not a choice: {did}"


def recipe_owner(recipe: str) -> str | None:
    """The command of a recipe: `pipeline` if it has stages, else `train`; None if there is none that can be read.

    Call it inside Hydra.
    """
    loader: Any = GlobalHydra.instance().config_loader()
    path = f"experiment/{recipe}"
    source = next((source for source in loader.repository.get_sources() if source.is_config(path)), None)
    with contextlib.suppress(HydraException, OmegaConfBaseException, YAMLError, ValueError):  # reported later
        text = getattr(source, "text", None)  # of a file: to parse all recipes would take a third of a second
        if text is not None and not re.search(r"\bstages\b['\"]?\s*:", text(path)):
            return "train"
        if source is not None:
            return "pipeline" if "stages" in loader.repository.load_config(path).config else "train"
    return None


def key_problem(verb: str, override: Override, config: DictConfig, chosen: Chosen) -> str | None:
    """Apply one value to `config`; a sentence if that cannot be done."""
    key, word = override.key_or_group, _short(override.input_line)
    if override.package is not None:
        return f"{word}: groups have no @package here; write {key}=<name>"
    found = _find(config, key)
    if found is None:
        if key.split(".")[0] in chosen.failed and _is_option(key):
            return None
        return unknown_key(verb, key, config, chosen.available)
    if isinstance(found, str):
        return found
    if override.is_delete():
        return f"{word}: no option can be removed; give {key}=null where it may be null"
    if override.is_add() and not override.is_force_add():
        return f"{word}: {key} is there already; write it without the +"
    hint, optional = unwrap_optional(found.type)
    if override.is_sweep_override():
        return _sweep_problem(override, is_text=hint in (str, Any), may_be_list=hint is Any)
    value = override.value()
    try:
        if isinstance(value, int | float) and isinstance(value, bool) != (hint is bool) and hint in (bool, int, float):
            raise ValueError(value)  # OmegaConf would take true for 1 and 2 for true
        OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, ValueError):
        if value is None and not optional:
            return f"{key}=null: a value is needed, {_example(key, found)}"
        if hint is str and isinstance(value, list):
            return f"{word}: a text is needed; quote it: \"{key}='{','.join(map(str, value))}'\""
        if typing.get_origin(hint) is list and isinstance(value, str):
            return f"{word}: a list is needed; write {shell_word(key, [value])}"
        return f"{word}: {_needed(hint)} is needed, {_example(key, found)}"
    return None


def _sweep_problem(override: Override, *, is_text: bool, may_be_list: bool = False) -> str:
    key = override.key_or_group
    text = (override.input_line or "").partition("=")[2]
    quoted = f"; for one text, quote it: \"{key}='{text}'\"" if is_text else ""
    quoted = f"; for a list, write '{key}=[{text}]'" if may_be_list else quoted
    return f"{_short(override.input_line)}: several values need -m (one run each){quoted}"


class _Found(NamedTuple):
    type: Any
    default: Any


def _find(config: DictConfig, key: str) -> _Found | str | None:
    """The option's type and present value; a sentence if it lies inside something that is null; None if unknown."""
    node: Any = config
    cls: Any = OmegaConf.get_type(config)
    inside_null = ""
    *parents, last = key.split(".")
    for depth, part in enumerate(parents, 1):
        hints = type_hints(cls)
        if part not in hints:
            return None
        node = None if node is None or OmegaConf.is_missing(node, part) else node[part]
        cls = OmegaConf.get_type(node) if isinstance(node, DictConfig) else unwrap_optional(hints[part])[0]
        if node is None and not inside_null:
            inside_null = ".".join(parents[:depth])
    hints = type_hints(cls)
    if last not in hints:
        return None
    if inside_null:
        more = f"give {inside_null}=<name>, or experiment_dir" if "." not in inside_null else f"drop {inside_null}=null"
        return f"{key} cannot be set: {inside_null} is null; {more}"
    return _Found(hints[last], None if OmegaConf.is_missing(node, last) else node[last])


def missing_problem(key: str, config: DictConfig) -> str:
    """The sentence for a value that only the user can give."""
    found = next((option for option in options(typed_with_missing(config)) if option.key == key), None)
    meaning = f" ({found.metadata['help'].rstrip('.')})" if found is not None and found.metadata.get("help") else ""
    return f"{key} is missing: give {key}=<value>{meaning}"


def _needed(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(typing.get_args(hint))} numbers"
    if typing.get_origin(hint) is list:
        return "a list"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, "a group of options")


def _example(key: str, found: _Found) -> str:
    hint, _ = unwrap_optional(found.type)
    value = OmegaConf.to_container(found.default) if OmegaConf.is_config(found.default) else found.default
    if value is None or value == [] or isinstance(value, dict):
        examples = {int: 100, float: 1e-5, bool: True, str: "name", list: "[a,b]"}
        value = examples.get(typing.get_origin(hint) or hint, "null")
    shown = str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "").replace("1e-05", "1e-5")
    return f"for example {key}={shown}"


def _short(text: str | None, limit: int = 80) -> str:
    text = text or ""
    return text if len(text) <= limit else f"{text[:limit]}..."


_HYDRA_KEYS = [
    f"hydra{key}"
    for key in (".run.dir", ".sweep.dir", ".sweep.subdir", ".job.name", ".verbose", "/launcher", "/sweeper")
]


def unknown_key(verb: str, key: str, config: DictConfig, names: Iterable[str]) -> str:
    """The sentence for a key that no option of a configuration has; `names` are those of its groups."""
    group, _, rest = key.partition(".")
    if group in groups(verb):
        having = [n for n, cls in choices(group, verb).items() if rest in {o.key for o in options(cls())}]
        if rest and having:
            return f"{key} is an option of {group}={' and '.join(having)}: choose that, or remove {key}"
    keys = [option.key for option in options(typed_with_missing(config))]
    last = key.split(".")[-1]
    same = [k for k in keys if k.split(".")[-1] == last]
    if not same:
        near_last = nearest(last, [k.split(".")[-1] for k in keys]) if "." not in key else None
        near = nearest(key, [*keys, *names])
        same = [k for k in keys if k.split(".")[-1] == near_last] if near is None and near_last else []
        same = same or ([near] if near else [])
    owners = owners_of(key, verb)  # then the key is probably not mistyped
    did = f"did you mean {' or '.join(same[:3])}?" if same and not owners else f"`{verb} --help` lists all"
    return f"there is no option {key[:80]}: {did}{owners}"


def condensed(lines: list[str], verb: str) -> str:
    """Hydra's own message on one line, with the nearest key if it names one that does not exist."""
    text = " ".join(lines[:2])
    if unknown := re.match(r"Could not override '([\w./]+)'", text):
        near = nearest(unknown[1], _HYDRA_KEYS)
        return f"there is no option {unknown[1]}: " + (f"did you mean {near}?" if near else "`--hydra-help` tells more")
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), None)
    names = [field for group in groups(verb) for cls in choices(group, verb).values() for field in vars(cls())]
    near = nearest(key.split(".")[-1], names) if key else None
    return f"{text} ({key}: did you mean {near}?)" if near else text
