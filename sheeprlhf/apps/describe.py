"""Descriptions of the configuration as text: choices, defaults, types, ranges and recipes."""

import typing
from typing import Any

import yaml

from sheeprlhf.config.compose import configs_directory
from sheeprlhf.config.registry import Option, choices, unwrap_optional

_NAMES = {int: "whole number", float: "number", bool: "true|false", str: "text"}


def meaning_of(cls: type) -> str:
    """The first line of a dataclass's documentation."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def choices_of(group: str, verb: str = "") -> dict[str, str]:
    """Every choice of a group with its meaning: the dataclasses, then the files of configs/."""
    classes = choices(group, verb)
    files = sorted(path.stem for path in (configs_directory() / group).glob("*.yaml"))
    found = {name: meaning_of(cls) for name, cls in classes.items()}
    return found | {name: "from a file" for name in files if name not in classes}


def default_choices(verb: str) -> dict[str, str | None]:
    """Default choices of a command by group; None where nothing is chosen."""
    content = yaml.safe_load((configs_directory() / f"{verb}.yaml").read_text(encoding="utf-8"))
    pairs = [pair for line in content["defaults"] if isinstance(line, dict) for pair in line.items()]
    return {group: None if name == "???" else name for group, name in pairs if " " not in group}


def recipe_names(verb: str = "train") -> list[str]:
    """The recipes of configs/experiment for `train` or for `pipeline`, whose recipes have stages; "": all."""
    paths = sorted((configs_directory() / "experiment").glob("*.yaml"))
    names = [path.stem for path in paths]
    return [name for name in names if not verb or bool(stages_of_recipe(name)) == (verb == "pipeline")]


def stages_of_recipe(name: str) -> dict[str, str]:
    """The command of each stage, if it is a recipe of `pipeline`, else nothing."""
    path = configs_directory() / "experiment" / f"{name}.yaml"
    if not path.is_file() or "\nstages:" not in (text := path.read_text(encoding="utf-8")):
        return {}
    return {str(stage): str(command) for stage, command in (yaml.safe_load(text)["stages"] or {}).items()}


def recipe_meaning(name: str) -> str:
    """The recipe's first comment, where it is one of ours."""
    path = configs_directory() / "experiment" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line[1:].strip() for line in lines if line.startswith("# ") and "@package" not in line), "a recipe")


def recipe_content(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Choices of a recipe by group, and its values by key, including those of a recipe that it extends."""
    content = yaml.safe_load((configs_directory() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    chosen: dict[str, str] = {}
    values: dict[str, Any] = {}
    for line in content.pop("defaults", []):
        if isinstance(line, dict):
            chosen |= {key.removeprefix("override ").lstrip("/"): str(value) for key, value in line.items()}
        elif line != "_self_":
            extended = recipe_content(line)
            chosen |= extended[0]
            values |= extended[1]
    return chosen, values | dict(_leaves(content, ""))


def _leaves(node: dict[str, Any], prefix: str) -> typing.Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def type_name(hint: Any) -> str:
    """The kind of value, in a word or two; empty where anything is taken."""
    plain, optional = unwrap_optional(hint)
    if typing.get_origin(plain) is tuple:
        return "numbers"
    if typing.get_origin(plain) is list:
        return "texts"
    if plain is Any:
        return ""
    return _NAMES.get(plain, "group") + (" or null" if optional else "")


def allowed(option: Option) -> str:
    """Allowed values: type and range, or the list of choices."""
    metadata = option.metadata
    low, high, above = metadata.get("minimum"), metadata.get("maximum"), metadata.get("above")
    if metadata.get("choices"):
        return f"one of {', '.join(metadata['choices'])}"
    bounds = []
    if above is not None:
        bounds.append(f"above {above:g}")
    if low is not None:
        bounds.append(f"{low:g} to {high:g}" if high is not None else f"{low:g} or more")
    elif high is not None:
        bounds.append(f"at most {high:g}")
    name = type_name(option.type)
    null = name.endswith(" or null")
    kind = name.removesuffix(" or null").replace("|", " or ")
    unit = metadata.get("unit") if option.value is None else None  # else the value shows it
    kind = f"{kind} of {unit}" if unit else kind
    return ", ".join(filter(None, (kind, " and ".join(bounds), "or null" if null else "")))


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return str(value)
