"""`--help`: the commands, and for each its groups, choices and options, read from the configuration itself."""

from typing import Any

from rich.text import Text

from sheeprlhf.apps.arguments import FLAGS, PLOT, VERBS
from sheeprlhf.apps.terminal import Screen, columns, entry, heading, paragraph

_OPTION_FACTS = (
    r"\[[^\[\]]*(\[[^\[\]]*\])?\](?=$|\s+One of)"  # of an option: type, unit and default, at the end of its meaning
)
_WIDE_SCREEN = 100  # columns from which on options have their meaning next to them


def print_overview() -> None:
    """All commands."""
    screen = Screen()
    screen.print(_usage("<command>"), Text("\nFine-tune and align language models.\n"), heading("Commands:"), sep="\n")
    for verb, meaning in VERBS.items():
        screen.print(entry(verb, meaning, width=9))
    screen.print()
    screen.print(paragraph("Start with `train task=sft`; `list` and `<command> --help` tell what there is."))


def print_verb_help(verb: str, overrides: list[str], config_dir: str | None) -> None:
    """Groups with their choices, every option of the composed configuration, and the flags.

    Raises:
        ConfigError: an override among the words cannot be used.
    """
    from sheeprlhf.config.compose import Source, compose_for_help, configs_directory

    source = Source(verb, configs_directory(), verb, config_dir)
    config, available = compose_for_help(source, overrides)
    screen = Screen()
    screen.print(_usage(verb), Text(), paragraph(VERBS[verb]), sep="\n")
    for group, names in available.items():
        _print_group(screen, verb, group, names, config)
    screen.print(heading("\nOptions, with the defaults of the choices above:"))
    _print_options(screen, verb, config)
    screen.print(heading("\nFlags:"))
    for flag in (*FLAGS, PLOT) if verb == "eval" else FLAGS:
        spelled = ", ".join(filter(None, (flag.name, flag.short))) + (f" <{flag.value}>" if flag.value else "")
        screen.print(entry(spelled, flag.help, width=28))


def _usage(verb: str) -> Text:
    return heading(f"sheeprlhf {verb}", "[group=choice] [option=value] [--flag]")


def _print_group(screen: Screen, verb: str, group: str, names: list[str], config: Any) -> None:
    from omegaconf import OmegaConf

    from sheeprlhf.apps.show import meaning_of, recipe_meaning
    from sheeprlhf.config.registry import choices

    classes = choices(group, verb) if group != "experiment" else {}
    needed = bool(classes) and OmegaConf.is_missing(config, group)
    chosen = None if needed or not classes else OmegaConf.select(config, f"{group}.config_name")
    note = "(must be given)" if needed else f"(default {chosen})" if chosen else ""
    screen.print(heading(f"\n{group}=", note, "odd" if needed else "faint"))
    for name in sorted(names, key=lambda name: list(classes).index(name) if name in classes else len(classes)):
        meaning = meaning_of(classes[name]) if name in classes else "from a file"
        meaning = meaning if group != "experiment" else recipe_meaning(name)
        screen.print(entry(name, meaning, width=max([18, *map(len, names)])))


def _print_options(screen: Screen, verb: str, config: Any) -> None:
    from sheeprlhf.config.registry import choices, options

    part = ""
    for option in options(config):
        if option.key == "task" and option.value == "???":
            for name, cls in choices("task", verb).items():
                screen.print(f"\n  with task={name}:", style="faint")
                for inner in options(cls(), "task."):
                    _print_option(screen, inner)
        elif not option.key.endswith("config_name") and option.key != "experiment":  # these are set by choosing
            before, part = part, option.key.rpartition(".")[0].partition(".")[0]
            if before != part:
                screen.print()
            _print_option(screen, option)


def _print_option(screen: Screen, option: Any) -> None:
    from sheeprlhf.apps.show import shown, type_name

    if option.key.endswith("config_name"):
        return
    value = shown(option.value)
    default = "must be given" if value == "???" else f"default {value}"
    facts = [type_name(option.type), option.metadata.get("unit", ""), default]
    meaning = f"{option.metadata.get('help', '')} [{', '.join(fact for fact in facts if fact)}]"
    if option.metadata.get("choices"):
        meaning += f" One of {', '.join(option.metadata['choices'])}."
    text = entry(option.key, meaning, width=36 if columns() >= _WIDE_SCREEN else 4)
    text.highlight_regex(_OPTION_FACTS, "faint")
    screen.print(text)
