"""`--help`: the commands, and for each its groups, choices and options, read from the configuration itself."""

import shutil
import textwrap
import typing
from typing import Any, NamedTuple

VERBS = {
    "train": "Train a model: `train task=sft` works offline on a CPU.",
    "eval": "Evaluate a run, or any model on any dataset: `eval task=perplexity experiment_dir=<run>`.",
}


class Flag(NamedTuple):
    """A flag of Hydra's; `value` names what follows it."""

    name: str
    short: str
    value: str
    help: str


FLAGS = (
    Flag("--help", "-h", "", "This text; add choices, as in `train task=sft model=opt --help`, to see their options."),
    Flag("--cfg", "-c", "job|hydra|all", "Print the composed configuration and do nothing else."),
    Flag("--resolve", "", "", "With --cfg: resolve interpolations."),
    Flag("--package", "-p", "key", "With --cfg: print this part alone."),
    Flag("--multirun", "-m", "", "A sweep: several values, as in seed=1,2,3, make one run each."),
    Flag("--run", "-r", "", "One run; the default."),
    Flag("--config-dir", "-cd", "folder", "A folder of your own groups and recipes (model/, data/, experiment/)."),
    Flag("--config-name", "-cn", "name", "Compose this file of --config-dir instead of the command's own."),
    Flag("--info", "-i", "what", "Print what Hydra found: config, defaults, defaults-tree, plugins, searchpath, all."),
    Flag("--shell-completion", "-sc", "", 'Shell completion: eval "$(sheeprlhf -sc install=bash)".'),
    Flag("--hydra-help", "", "", "Hydra's own help."),
    Flag("--version", "", "", "Hydra's version."),
)
_NAMES = {int: "whole number", float: "number", bool: "true|false", str: "text"}


def print_overview() -> None:
    """All commands."""
    print("sheeprlhf <command> [group=choice] [option=value] [--flag]\n\nFine-tune and align language models.\n")
    print("Commands:")
    for verb, meaning in VERBS.items():
        print(_entry(verb, meaning, width=8))
    print("\n`sheeprlhf <command> --help` lists a command's groups, choices and options.")


def print_verb_help(verb: str, overrides: list[str], config_dir: str | None) -> None:
    """Groups with their choices, every option of the composed configuration, and the flags.

    Raises:
        ConfigError: an override among the words cannot be used.
    """
    from sheeprlhf.structure.compose import Source, compose_for_help, configs_directory

    source = Source(verb, configs_directory(), verb, config_dir)
    config, available = compose_for_help(source, overrides)
    print(f"sheeprlhf {verb} [group=choice] [option=value] [--flag]\n\n{VERBS[verb]}")
    for group, names in available.items():
        _print_group(verb, group, names, config)
    print("\nOptions, with the defaults of the choices above:")
    _print_options(verb, config)
    print("\nFlags:")
    for flag in FLAGS:
        spelled = ", ".join(filter(None, (flag.name, flag.short))) + (f" <{flag.value}>" if flag.value else "")
        print(_entry(spelled, flag.help, width=34))


def _print_group(verb: str, group: str, names: list[str], config: Any) -> None:
    from omegaconf import OmegaConf

    from sheeprlhf.structure.registry import choices

    classes = choices(group, verb) if group != "experiment" else {}
    needed = bool(classes) and OmegaConf.is_missing(config, group)
    chosen = None if needed or not classes else OmegaConf.select(config, f"{group}.config_name")
    print(f"\n{group}=" + (" (must be given)" if needed else f" (default {chosen})" if chosen else ""))
    for name in sorted(names, key=lambda name: list(classes).index(name) if name in classes else len(classes)):
        doc = (classes[name].__doc__ or "").strip().splitlines()[0] if name in classes else "from a file"
        print(_entry(name, doc if group != "experiment" else _recipe_meaning(name), width=22))


def _recipe_meaning(name: str) -> str:
    """The recipe's first comment, where it is one of ours."""
    from sheeprlhf.structure.compose import configs_directory

    path = configs_directory() / "experiment" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line[1:].strip() for line in lines if line.startswith("# ") and "@package" not in line), "a recipe")


def _print_options(verb: str, config: Any) -> None:
    from sheeprlhf.structure.registry import choices, options

    for option in options(config):
        if option.key == "task" and option.value == "???":
            for name, cls in choices("task", verb).items():
                print(f"  with task={name}:")
                for inner in options(cls(), "task."):
                    _print_option(inner)
        else:
            _print_option(option)


def _print_option(option: Any) -> None:
    if option.key.endswith("config_name") or option.key == "experiment":
        return  # set by choosing
    shown = _shown(option.value)
    default = "must be given" if shown == "???" else f"default {shown}"
    facts = [_type_name(option.type), option.metadata.get("unit", ""), default]
    meaning = f"{option.metadata.get('help', '')} [{', '.join(fact for fact in facts if fact)}]"
    if option.metadata.get("choices"):
        meaning += f" One of {', '.join(option.metadata['choices'])}."
    print(_entry(option.key, meaning, width=34))


def _type_name(hint: Any) -> str:
    from sheeprlhf.structure.registry import unwrap_optional

    plain, optional = unwrap_optional(hint)
    if typing.get_origin(plain) is tuple:
        return "numbers"
    if plain is Any:
        return ""
    return _NAMES.get(plain, "group") + (" or null" if optional else "")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _entry(name: str, meaning: str, *, width: int) -> str:
    columns = max(60, min(120, shutil.get_terminal_size((100, 20)).columns))
    head = f"  {name:<{width}} "
    lines = textwrap.wrap(meaning, columns - len(head) if len(head) <= width + 3 else columns - width - 3) or [""]
    if len(head) > width + 3:
        return "\n".join([head.rstrip(), *(" " * (width + 3) + line for line in lines)])
    return head + f"\n{' ' * (width + 3)}".join(lines)
