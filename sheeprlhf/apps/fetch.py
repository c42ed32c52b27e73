"""`fetch`: bring a model into the local cache, so that everything else works without a network."""

import sys
from pathlib import Path

from sheeprlhf.apps.arguments import ParsedArgs
from sheeprlhf.config.command_words import command, option_word
from sheeprlhf.config.registry import choices
from sheeprlhf.security.model_folder import INDEX, WEIGHTS, check_model, folder_of, pickled_files, safetensors_files
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.run import FetchConfig
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.home import (
    EMBEDDED,
    PICKLED,
    SMOLLM2,
    WEIGHTS_FILES,
    WITHOUT_HUB,
    expand_home,
    fetched_folder,
    why_offline,
)

_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]  # never code
_SAFETENSORS, _PICKLES = ["*.safetensors"], ["pytorch_model*.bin"]  # the latter where there are none of the former


def run(config: FetchConfig, args: ParsedArgs | None = None) -> int:
    """Fetch `config.model`, if there is anything to fetch, and print its place. Raises ModelError if that fails."""
    model, name = config.model, str(config.model.repo_name)
    if name.startswith(EMBEDDED):
        print(f"model={model.config_name} is part of the package: nothing to fetch")
    elif expand_home(name).is_dir():
        print(f"model.repo_name={name} is a folder: nothing to fetch")
    else:
        folder = fetch_from_hub(model)
        print(f"{name} is in {folder}")
        words = _convert(model, folder, config.cache_dir)
        print(f"next: {command(['train', 'task=sft', *words])}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _convert(model: ModelConfig, folder: Path, cache_dir: str | None) -> list[str]:
    """Convert pickled weights, if the model has no others; the words with which training finds the model."""
    name, words = str(model.repo_name), [f"model={model.config_name}"]
    usual = getattr(choices("model").get(model.config_name), "repo_name", None)
    if name != usual:
        words.append(option_word("model.repo_name", name))
    if model.library_cfg.revision is not None:
        words.append(option_word("model.library_cfg.revision", model.library_cfg.revision))
    check_model(folder)
    if pickled_files(folder):
        from sheeprlhf.security.pickled_weights import converted_folder  # imports torch

        converted = converted_folder(folder, name, _say, cache_dir)
        print(f"its weights are in {converted}, as safetensors")
        if cache_dir is not None:
            return [words[0], option_word("model.repo_name", str(converted))]
    return words


def fetch_from_hub(model: ModelConfig) -> Path:
    """The folder in the hub's cache with the model's files. Raises ModelError, within 5 seconds if offline."""
    name, revision = str(model.repo_name), model.library_cfg.revision
    offline = "model.library_cfg.local_files_only is set" if model.library_cfg.local_files_only else why_offline()
    if offline:
        folder = _in_cache(name, revision)
        if folder is not None:
            _say(f"{offline}, and the hub's cache has the model")
            return folder
        other = f"; {WITHOUT_HUB}" if name == SMOLLM2 else ""
        raise ModelError(f"model.repo_name={name}: {offline}, so nothing can be fetched; connect and try again{other}")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        names = HfApi().list_repo_files(name, revision=revision)
        kind = _SAFETENSORS if any(file in names for file in (WEIGHTS, INDEX)) else _PICKLES
        if not any(file in names for file in WEIGHTS_FILES):
            raise ModelError(f"model.repo_name={name} has no weights that are read ({WEIGHTS}, {PICKLED})")
        wanted = _FILES + kind
        nested = [f"*/{pattern}" for pattern in wanted]  # copies for other programs
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=nested))
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        advice = "check the name and model.library_cfg.revision (a gated model needs `hf auth login`)"
        raise ModelError(f"model.repo_name={name}: the hub answers {status}; {advice}") from None
    except (HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"model.repo_name={name} could not be fetched: {reason}; try again") from None


def _in_cache(name: str, revision: str | None) -> Path | None:
    """The model's folder in the hub's cache, or that of `tools/fetch_smollm2.py`, if all of its weights are there."""
    if name == SMOLLM2 and revision is None and (made := fetched_folder(SMOLLM2)).is_dir():
        return made
    try:
        folder = folder_of(name, revision, local_only=True)
        files = safetensors_files(folder) or pickled_files(folder)
    except (OSError, ModelError):
        return None
    return folder if files and all((folder / file).is_file() for file in files) else None
