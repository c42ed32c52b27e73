"""A run's saved `config.yaml`, which may come from a stranger: plain data only, of bounded size."""

from pathlib import Path
from typing import Any

import yaml

from sheeprlhf.config.option_checks import near_path
from sheeprlhf.config.path_checks import is_template_file
from sheeprlhf.config.registry import from_dict
from sheeprlhf.config.renames import rename_keys
from sheeprlhf.structure.option import Config
from sheeprlhf.utils.errors import ConfigError

MAX_BYTES = 1_000_000


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, with which a small file can describe a huge tree."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name)")
        return super().compose_node(parent, index)


def read_run_config(experiment_dir: str, *, key: str = "experiment_dir") -> dict[str, Any]:
    """The saved configuration of a run.

    Args:
        experiment_dir: the run.
        key: the option that names it, for messages.

    Raises:
        ConfigError: there is none, or it is not plain YAML below `MAX_BYTES`.
    """
    path = Path(experiment_dir) / "config.yaml"
    if not path.is_file():
        what = "is not a directory" if not path.parent.is_dir() else "is no run directory: it has no config.yaml"
        near = None if path.parent.is_dir() else near_path(experiment_dir)
        did = f"did you mean {key}={near}? `list runs` shows all" if near else "`list runs` shows which there are"
        raise ConfigError(f"{key}={experiment_dir} {what}: {did}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes: not a configuration of ours")
    try:
        saved = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, OSError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} cannot be read ({reason}): give another {key}") from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} is not a configuration of ours: it holds no keys")
    problems = rename_keys(saved)
    if problems:
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    return saved


def saved_group(experiment_dir: str, group: str, *, key: str = "experiment_dir") -> Config:
    """The run's `model`, `data` or `task`, typed.

    Code that came with a model is trusted for one command, never by a file: `trust_remote_code` is not carried over.

    Raises:
        ConfigError: the file or the group in it cannot be used.
    """
    saved = read_run_config(experiment_dir, key=key).get(group)
    if not isinstance(saved, dict):
        raise ConfigError(f"{Path(experiment_dir) / 'config.yaml'} has no {group}: give {group}=<choice>")
    chosen, left = saved.get("chat_template"), Path(experiment_dir) / "final" / "chat_template.jinja"
    if isinstance(chosen, str) and is_template_file(chosen) and not Path(chosen).is_file() and left.is_file():
        saved["chat_template"] = str(left)  # the user's file has moved
    if isinstance(saved.get("library_cfg"), dict):
        saved["library_cfg"]["trust_remote_code"] = False
    try:
        return from_dict(group, saved)
    except ConfigError as error:
        path = Path(experiment_dir) / "config.yaml"
        raise ConfigError(*(f"{path}: {problem}; give {group}=<choice>" for problem in error.problems)) from error
