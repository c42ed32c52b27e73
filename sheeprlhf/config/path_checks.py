"""Check files and folders that a configuration names, and make their paths absolute."""

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sheeprlhf.config.command_words import shell_word
from sheeprlhf.config.option_checks import did_you_mean, near_path
from sheeprlhf.config.registry import datasets_of, options, replace_options
from sheeprlhf.structure.data import DataConfig, LocalDataConfig
from sheeprlhf.structure.reward import term_folder
from sheeprlhf.structure.run import RootConfig
from sheeprlhf.utils.chat_templates import OPTION as TEMPLATE_OPTION
from sheeprlhf.utils.chat_templates import SUFFIX as TEMPLATE_SUFFIX
from sheeprlhf.utils.chat_templates import built_in_templates
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import EMBEDDED, PICKLED, WEIGHTS_FILES, embedded_folder, expand_home, home_problem
from sheeprlhf.utils.output import real_file

_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def data_file_problems(key: str, value: Any) -> Iterator[str]:
    """Problems of the data files that an option names."""
    try:
        data_files(key, value)
    except ConfigError as error:
        yield str(error)


def data_is_here(data: DataConfig) -> bool:
    """True if a dataset's files are local: embedded, or named by the user; the hub is not contacted."""
    names = [str(of.dataset_name) for of in datasets_of(data) if not isinstance(of, LocalDataConfig)]
    return all(name.startswith(EMBEDDED) or os.path.isdir(expand_home(name)) for name in names)


def new_folder_problems(key: str, path: str, *, expands: bool = True) -> Iterator[str]:
    """Problems of making or writing into the folder that an option names; `~` counts only with `expands`."""
    problem = home_problem(key, path)
    if problem is None and not expands and path.startswith("~") and not os.path.lexists(path):
        problem = f"{key}={path} is not expanded: give {expand_home(path)}"
    if problem:
        yield problem
        return
    folder = expand_home(path).absolute()
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not existing.is_dir():
        yield f"{key}={path} cannot be made: {existing} is not a folder; give another {key}"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"{key}={path} cannot be written: {existing} does not permit it; give another {key}"
    else:
        try:
            os.lstat(folder)
        except FileNotFoundError:
            return
        except OSError as error:  # the name is too long
            yield f"{key}={path} cannot be made: {error.strerror}; give another {key}"


def is_weights_name(name: str) -> bool:
    """True if the text can name weights of a run."""
    return re.fullmatch(r"final|best|last|step-\d+", name) is not None


def weights_problems(run_dir: str, name: str, *, key: str, name_key: str) -> Iterator[str]:
    """Problems of the weights final, best, last or step-<n> of a run; the keys are the options that name both."""
    again = shell_word("resume_from", run_dir)
    if not is_weights_name(name):
        did = did_you_mean(name, ("final", "best", "last"), "it", key=f"{name_key}=")
        yield f"{name_key}={name} is unknown: {did} may be final, best, last or step-<n>"
        return
    if name == "final":
        if not Path(run_dir, "final").is_dir():
            yield f"{key}={run_dir}: this run has no final/ yet; finish it with {again}, or give {name_key}=last"
        return
    there = sorted(path.name for path in Path(run_dir).glob("checkpoints/step-*") if path.name[5:].isdigit())
    if not there:
        yield f"{key}={run_dir}: this run has no checkpoint; continue it by {again}"
    elif name.startswith("step-") and name not in there:
        yield f"{name_key}={name}: {run_dir} has no such checkpoint; it has {', '.join(there)}"


def is_hub_id(name: str) -> bool:
    """True if the text is a possible repository name of the hub."""
    return _HUB_ID.fullmatch(name) is not None


def model_folder(name: str) -> Path | None:
    """The folder that `model.repo_name` names, the embedded model's included; None if it names none."""
    folder = embedded_folder(name) if name.startswith(EMBEDDED) else expand_home(name).absolute()
    return folder if os.path.isdir(folder) else None


_RUN_OF = {"reward.folder": "task.rm_experiment_dir", "model.repo_name": "task.sft_experiment_dir"}


def model_problem(
    name: str | None, *, weights: bool, tokenizer: bool = True, key: str = "model.repo_name"
) -> str | None:
    """The reason that files of a model, with `weights` and `tokenizer`, cannot be loaded, without the hub."""
    given = f"{key}={'null' if name is None else name}" if key else str(name)
    folder = None if name is None else model_folder(name)
    if name is None or folder is None:
        if name is not None and os.path.isfile(expand_home(name)):  # unlike Path.is_file it takes any name
            return f"{given} is a file: give the folder that has config.json, or a hub id (owner/name)"
        if name is None or not is_hub_id(name):
            did = "" if name is None else near_file(key, name)
            return f"{given} is neither a folder nor a hub id (owner/name): {did}give one of them"
        return None
    run = folder.resolve().parent
    # a run's reward model has its model's config.json beside its adapters
    has_config = (folder / "config.json").is_file()
    if (folder / _ADAPTER_CONFIG).is_file() and (key == "reward.folder" or not has_config):
        from sheeprlhf.security.model_folder import merge_advice

        if key in _RUN_OF and (run / "config.yaml").is_file():
            return f"{given}: these are adapters of a run, which knows their model: give {_RUN_OF[key]}={run} instead"
        return f"{given}: {merge_advice(folder)}"
    if not has_config:
        inside, did = folder / "final", "give one in the hub's layout"
        if key in _RUN_OF and (inside / _ADAPTER_CONFIG).is_file():
            did = f"did you mean {shell_word(_RUN_OF[key], str(folder.resolve()))}?"
        elif (inside / "config.json").is_file():
            did = f"did you mean {key}={inside}?"
        return f"{given}: this folder has no config.json: {did}"
    if tokenizer and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return f"{given}: this folder has no tokenizer ({_TOKENIZER_FILES[0]}): copy the model's into it"
    if weights and not any((folder / file).is_file() for file in WEIGHTS_FILES):
        return (
            f"{given}: this folder has no weights, neither {WEIGHTS_FILES[0]} nor {PICKLED}, in one file or in shards "
            "with an index: give a folder that has them (model.random_init=true trains random weights instead)"
        )
    return None


def adapter_problem(adapter: str) -> str | None:
    """The reason that `model.adapter` cannot be loaded, from local files only; the hub is not contacted."""
    given, folder = f"model.adapter={adapter}", expand_home(adapter)
    if not folder.is_dir():
        is_file = os.path.lexists(folder)
        return f"{given} is a file: give a folder" if is_file else _missing_folder("model.adapter", adapter)
    if (folder / _ADAPTER_CONFIG).is_file():
        return None
    final = folder / "final"
    fix = f"model.adapter={final}" if (final / _ADAPTER_CONFIG).is_file() else "a folder of PEFT's save_pretrained"
    return f"{given}: this folder has no {_ADAPTER_CONFIG}: give {fix}"


def dataset_problem(name: str | None) -> str | None:
    """The reason that `data.dataset_name` names no dataset, from local files only; the hub is not contacted."""
    if not name:
        return "data.dataset_name is null: give a hub id (owner/name) or a local folder"
    if os.path.isfile(expand_home(name)):
        return f"data.dataset_name={name} is a file: give data=local data.train_file={name}"
    if os.path.isdir(expand_home(name)):
        return _saved_dataset_problem("data.dataset_name", name)
    return None if name.startswith(EMBEDDED) else _missing_folder("data.dataset_name", name)


def _saved_dataset_problem(key: str, name: str) -> str | None:
    """The problem of a folder that `save_to_disk` of `datasets` wrote; None of another folder."""
    folder = expand_home(name)
    has_splits = (folder / "dataset_dict.json").is_file()
    if not has_splits and not ((folder / "state.json").is_file() and any(folder.glob("*.arrow"))):
        return None
    split = "['train']" if has_splits else ""
    fix = f"write datasets.load_from_disk({str(folder)!r}){split}.to_parquet('rows.parquet'), and give that file"
    return f"{key}={name} was written by save_to_disk, whose files are not read: {fix}"


def _missing_folder(key: str, name: str) -> str | None:
    """The problem of a name that is no folder; None if it can be a hub id of an owner."""
    if "/" in name and is_hub_id(name):
        return None
    did = near_file(key, str(expand_home(name)))
    return f"{key}={name} is neither a folder nor a hub id (owner/name): {did}give one of them"


def is_template_file(choice: str) -> bool:
    """True if `model.chat_template` is a path, not a name."""
    return "/" in choice or choice.endswith(TEMPLATE_SUFFIX)


def template_problem(choice: str, *, key: str = TEMPLATE_OPTION) -> str | None:
    """The reason that this word selects no chat template, as far as is known without the tokenizer."""
    if not is_template_file(choice):
        if _TEMPLATE_NAME.fullmatch(choice):
            return None
        return f"{key}={choice} is not a name: give {', '.join(built_in_templates())}, a name from the model, or a file"
    path = str(expand_home(choice))
    if not choice.endswith(TEMPLATE_SUFFIX):
        return f"{key}={choice} has an unknown ending: give a file that ends in {TEMPLATE_SUFFIX}"
    if not os.path.isfile(path):
        did = near_file(key, path)
        return f"{key}={choice} is not a file: {did}give the path of an existing one (from {Path.cwd()})"
    if not os.access(path, os.R_OK):
        return f"{key}={choice} cannot be read: change its permissions or give another file"
    return None


# of several kinds in a hub folder, the first is read
KINDS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TEXT = ".txt"  # only of the user's own files; in a folder with files of rows, it is a note about them
COMPRESSIONS = (".gz", ".bz2", ".zst")  # of one file of text, not archives
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    # openai_summarize_comparisons has valid1 and valid2, which is left out
    **dict.fromkeys(("validation", "valid", "valid1", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
_ENDINGS = f"{', '.join((*KINDS, TEXT))} (except for .parquet also with {', '.join(COMPRESSIONS)} behind)"


def file_kind(file: Path) -> tuple[str, str] | None:
    """The kind of a file of rows and its compression ("" for none), by the ending of its name; None for other files."""
    name = file.name.lower()
    compression = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    kind = Path(name.removesuffix(compression)).suffix
    if kind not in (*KINDS, TEXT) or (compression and kind == ".parquet"):
        return None
    return kind, compression


def split_of_name(file: Path, folder: Path) -> str | None:
    """The split that a file's path below a folder names, None if it names none."""
    stem = str(file.relative_to(folder)).lower()
    return next((SPLIT_WORDS[word] for word in re.split(r"[^a-z0-9]+", stem) if word in SPLIT_WORDS), None)


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders, hidden ones left out, in order."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def readable_files(files: Sequence[Path]) -> list[Path]:
    """Those files of a folder that are read: files of rows, else files of text."""
    kinds = {file: kind[0] for file in files if (kind := file_kind(file))}
    rows = [file for file, kind in kinds.items() if kind != TEXT]
    return rows or list(kinds)


def data_files(key: str, value: Any) -> list[Path]:
    """The files that paths, folders and patterns name, in order. Raises ConfigError for those of no use."""
    names = value if isinstance(value, list | tuple) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{key}={value} must be a file, a folder or a pattern, or a list of these")
    found: dict[str, Path] = {}
    for name in names:
        for file in _files_of(key, name):
            real = os.path.realpath(file)
            if real in found:
                raise ConfigError(f"{key} names {file} twice: remove one")
            found[real] = file
    return list(found.values())


def unread_files(value: Any) -> list[Path]:
    """Files in the folders of an option that are not read."""
    folders = [expand_home(name) for name in (value if isinstance(value, list | tuple) else [value] if value else [])]
    files = {folder: files_below(folder) for folder in folders if folder.is_dir()}
    return [file for found in files.values() for file in found if file not in readable_files(found)]


def _files_of(key: str, name: str) -> list[Path]:
    path = expand_home(name)
    if path.is_dir():
        if problem := _saved_dataset_problem(key, name):
            raise ConfigError(problem)
        files = readable_files(files_below(path))
        if not files:
            raise ConfigError(f"{key}={name} is a folder without a file that ends in {_ENDINGS}: give another one")
        _check_links(files, path)
        _check_splits(key, name, files, path)
    elif not os.path.lexists(path) and glob.has_magic(str(path)):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(match)]
        if not files:
            raise ConfigError(f"{key}={name} matches no file: give another pattern (from {Path.cwd()})")
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
        _check_links(files, root)
        _check_splits(key, name, files, root)
    else:
        files = [path]
    for file in files:
        if problem := _file_problem(key, str(file) if path.is_dir() or len(files) > 1 else name, file):
            raise ConfigError(problem)
    return files


def _file_problem(key: str, name: str, file: Path) -> str | None:
    """Problem of one file."""
    did = near_file(key, str(file))
    parts = name.split(",")
    if not os.path.lexists(file) and len(parts) > 1 and all(expand_home(part).exists() for part in parts):
        return f"{key}={name} is not a file: give a list, {shell_word(key, parts)}"
    if file_kind(file) is None:
        if bare := next((end for end in COMPRESSIONS if file.name.lower().endswith(end)), None):
            return (
                f"{key}={name} does not say what is in it: rename it so that it ends in .jsonl{bare} or in another of "
                f"{', '.join(KINDS[1:])} before {bare}"
            )
        return f"{key}={name} has an unknown ending: {did}give one that ends in {_ENDINGS}"
    if not os.path.isfile(file):
        return f"{key}={name} is not a file: {did}give the path of an existing one (from {Path.cwd()})"
    if not os.access(file, os.R_OK):
        return f"{key}={name} cannot be read: change its permissions or give another file"
    return None


def near_file(key: str, file: str) -> str:
    """The beginning of a message about a missing file that has a near name; empty if none has."""
    near = None if os.path.lexists(file) else near_path(file)
    return f"did you mean {key}={near}? Else " if near else ""


def _check_links(files: Sequence[Path], folder: Path) -> None:
    """Raise ConfigError for a link out of a folder: it could bring any other file into training."""
    for file in files:
        try:
            real_file(file, folder)
        except OSError as error:
            raise ConfigError(str(error)) from None


def _check_splits(key: str, name: str, files: Sequence[Path], folder: Path) -> None:
    """Raise ConfigError if a folder or a pattern has files of more than one split, of which some are for tests."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of_name(file, folder) or "train", []).append(file)
    if len(splits) == 1:
        return
    order = [split for split in ("train", "validation", "test") if split in splits]
    options = [shell_word(f"data.{split}_file", [str(file) for file in splits[split]]) for split in order]
    raise ConfigError(
        f"{key}={name} has files that are named for several splits ({', '.join(order)}): give each its own files, "
        + " ".join(options)
    )


_KINDS: dict[str, Callable[[str], bool]] = {
    # else a hub id, or a word
    **dict.fromkeys(("model.repo_name", "model.adapter", "data.dataset_name"), os.path.isdir),
    **dict.fromkeys(("reward.folder", "task.teacher"), os.path.isdir),
    **dict.fromkeys(("task.sft_experiment_dir", "task.rm_experiment_dir", "task.against"), os.path.isdir),
    **dict.fromkeys(("experiment_dir", "resume_from"), os.path.isdir),
    **dict.fromkeys(
        ("data.train_file", "data.validation_file", "data.test_file"),
        lambda path: os.path.exists(path) or bool(glob.glob(path, recursive=True)),
    ),
    "data.mix": lambda _: False,  # its datasets have options with paths
    "model.chat_template": lambda path: is_template_file(path) and os.path.isfile(path),
    **dict.fromkeys(("data.cache_dir", "root_dir"), lambda _: True),  # made where they are missing
}


_TERMS = "reward.terms"  # of which some name a folder


def absolute_value(key: str, value: Any) -> Any:
    """The value of an option; an absolute path if the option names a file or folder that is here."""
    if isinstance(value, list | tuple):
        return type(value)(absolute_value(key, entry) for entry in value)
    if isinstance(value, dict) and key == "data.mix":
        return {name: absolute_value(f"data.{name}", entry) for name, entry in value.items()}
    if key == _TERMS and isinstance(value, str):
        weight, star, source = value.rpartition("*")
        folder = term_folder(source.strip())
        return value if not folder else f"{weight}{star}model:{absolute_value('reward.folder', folder)}"
    if key not in _KINDS or not isinstance(value, str) or not value:
        return value
    path = expand_home(value)
    return str(path.absolute()) if _KINDS[key](str(path)) else value


def with_absolute_paths(config: RootConfig) -> RootConfig:
    """The configuration with absolute paths. Raises ConfigError if some lie in home directories that are not known."""
    found = {option.key: option.value for option in options(config) if option.key in (*_KINDS, _TERMS)}
    problems = [home_problem(key, path) for key, value in found.items() for path in _paths(value)]
    if any(problems):
        raise ConfigError(*filter(None, problems))
    change = {key: absolute_value(key, value) for key, value in found.items()}
    change = {key: value for key, value in change.items() if value != found[key]}
    if not change:
        return config
    new: RootConfig = replace_options(config, change)
    new.lock()
    return new


def _paths(value: Any) -> list[str]:
    if isinstance(value, dict):  # of data.mix
        value = [entry for name, entry in value.items() if f"data.{name}" in _KINDS]
    if isinstance(value, list | tuple):
        return [path for entry in value for path in _paths(entry)]
    return [value] if isinstance(value, str) else []


def absolute_words(words: list[str]) -> list[str]:
    """Words of a command line, `key=value`, with all unquoted paths absolute."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        found.append(f"{key}={absolute_value(key, value)}" if equals else word)
    return found
