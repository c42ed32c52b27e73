"""Files and folders that a configuration names: what is wrong with them, found before anything is loaded."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sheeprlhf.config.data_files import data_files, did_you_mean
from sheeprlhf.config.shell import shell_word
from sheeprlhf.security.model_folder import PICKLED, WEIGHTS_FILES, merge_advice
from sheeprlhf.structure.data import DataConfig, LocalDataConfig
from sheeprlhf.utils.chat_templates import OPTION as TEMPLATE_OPTION
from sheeprlhf.utils.chat_templates import SUFFIX as TEMPLATE_SUFFIX
from sheeprlhf.utils.chat_templates import built_in_templates
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import expand_home, home_problem
from sheeprlhf.utils.hub import EMBEDDED, embedded_folder

_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def data_file_problems(key: str, value: Any) -> Iterator[str]:
    """Problems of the data files that an option names."""
    try:
        data_files(key, value)
    except ConfigError as error:
        yield str(error)


def data_is_here(data: DataConfig) -> bool:
    """True if a dataset's files are local: embedded, or named by the user; the hub is not contacted."""
    name = str(data.dataset_name)
    return isinstance(data, LocalDataConfig) or name.startswith(EMBEDDED) or os.path.isdir(expand_home(name))


def new_folder_problems(key: str, path: str) -> Iterator[str]:
    """Problems of creating this folder or writing into it."""
    unknown = home_problem(key, path)
    if unknown:
        yield unknown
        return
    folder = expand_home(path).absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        yield f"{key}={path} cannot be made: {folder} is not a folder; give another {key}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield f"{key}={path} cannot be written: {folder} does not permit it; give another {key}"


def is_weights_name(name: str) -> bool:
    """True if the text can name weights of a run."""
    return re.fullmatch(r"final|best|last|step-\d+", name) is not None


def weights_problems(run_dir: str, name: str, *, key: str, name_key: str) -> Iterator[str]:
    """Problems of the weights of this name in a run.

    Args:
        run_dir: the run.
        name: "final", "best", "last" or "step-<n>".
        key: the option that names the run.
        name_key: the option that names the weights.
    """
    again = shell_word("resume_from", run_dir)
    if name == "final":
        if not Path(run_dir, "final").is_dir():
            yield (f"{key}={run_dir}: this run has no final/ yet; finish it with {again}, or give {name_key}=last")
        return
    there = sorted(path.name for path in Path(run_dir).glob("checkpoints/step-*") if path.name[5:].isdigit())
    if not there:
        yield f"{key}={run_dir}: this run has no checkpoint; go on with it by {again}"
    elif name.startswith("step-") and name not in there:
        yield f"{name_key}={name}: {run_dir} has no such checkpoint; it has {', '.join(there)}"


def is_hub_id(name: str) -> bool:
    """True if the text is a possible repository name of the hub."""
    return _HUB_ID.fullmatch(name) is not None


def model_folder(name: str) -> Path | None:
    """The folder that `model.repo_name` names, the embedded model's included; None if it names none."""
    folder = embedded_folder(name) if name.startswith(EMBEDDED) else expand_home(name).absolute()
    return folder if os.path.isdir(folder) else None


def model_problem(repo_name: str | None, *, weights: bool) -> str | None:
    """The reason that `model.repo_name` cannot be loaded, from local files only; the hub is not contacted.

    Args:
        repo_name: a folder, a hub id or an embedded model.
        weights: a folder needs them; they are not read when they are random or a run's.
    """
    name = "null" if repo_name is None else repo_name
    given = f"model.repo_name={name}"
    folder = model_folder(name)
    if repo_name is None or folder is None:
        if os.path.isfile(expand_home(name)):  # unlike Path.is_file it accepts names that no file can have
            return f"{given} is a file: give the folder that has config.json, or a hub id (owner/name)"
        if repo_name is None or not is_hub_id(name):
            return f"{given} is neither a folder nor a hub id (owner/name): give one of them"
        return None
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return f"{given}: {merge_advice(folder)}"
        return f"{given}: this folder has no config.json; give one in the hub's layout"
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return f"{given}: this folder has no tokenizer ({_TOKENIZER_FILES[0]}): copy the model's into it"
    if weights and not any((folder / file).is_file() for file in WEIGHTS_FILES):
        return (
            f"{given}: this folder has no weights, neither {WEIGHTS_FILES[0]} nor {PICKLED}, in one file or in shards "
            "with an index: give a folder that has them (model.random_init=true trains random weights instead)"
        )
    return None


def is_template_file(choice: str) -> bool:
    """True if `model.chat_template` is a path, not a name."""
    return "/" in choice or choice.endswith(TEMPLATE_SUFFIX)


def template_problem(choice: str, *, key: str = TEMPLATE_OPTION) -> str | None:
    """The reason that this word selects no chat template, as far as is known without the tokenizer."""
    if not is_template_file(choice):
        if _TEMPLATE_NAME.fullmatch(choice):
            return None
        return (
            f"{key}={choice} is no name: give {', '.join(built_in_templates())}, a name of the model's own, or a file"
        )
    path = str(expand_home(choice))
    if not choice.endswith(TEMPLATE_SUFFIX):
        return f"{key}={choice} has an unknown ending: give a file that ends in {TEMPLATE_SUFFIX}"
    if not os.path.isfile(path):
        did = did_you_mean(key, path)
        return f"{key}={choice} is not a file: {did}give the path of an existing one (from {Path.cwd()})"
    if not os.access(path, os.R_OK):
        return f"{key}={choice} cannot be read: change its permissions or give another file"
    return None


def run_folder_problems(given: str) -> list[str]:
    """Problems of the directory that `hydra.run.dir` names."""
    if given.startswith("~") and not os.path.lexists(given):  # a folder of this very name would be made
        return [
            home_problem("hydra.run.dir", given) or f"hydra.run.dir={given} is not expanded: give {expand_home(given)}"
        ]
    folder = Path(given).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        return [f"hydra.run.dir={folder}: {existing} is not a directory; choose another place"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"hydra.run.dir={folder}: {existing} is not writable; choose another place"]
    try:
        os.lstat(folder)
    except FileNotFoundError:
        return []
    except OSError as error:  # the name is too long
        return [f"hydra.run.dir={folder}: {error.strerror}; choose another place"]
    return []
