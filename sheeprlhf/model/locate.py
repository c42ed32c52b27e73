"""Locate a model's files: a folder, the embedded model, the hub's cache, the folder of `fetch`, or the hub. No torch.

Asked before anything heavy is imported, so that a model which cannot be had is an error within five seconds.
"""

from pathlib import Path
from typing import NamedTuple

from sheeprlhf.config.path_checks import model_folder, model_problem
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.home import SMOLLM2, WEIGHTS_FILES, WITHOUT_HUB, expand_home, fetched_folder, why_offline


class Located(NamedTuple):
    """Arguments of `from_pretrained`."""

    source: str  # a folder, or a hub id
    local_only: bool  # the hub is not to be asked
    note: str = ""  # a line for the user, where there was a choice; else empty
    no_hub: bool = False  # the hub was asked for, and does not answer


def locate(cfg: ModelConfig) -> Located:
    """The place of the model that `cfg.repo_name` names.

    Raises:
        ModelError: there is no such folder or embedded model, or the hub does not answer and the cache lacks the model.
    """
    problem = model_problem(cfg.repo_name, weights=False, tokenizer=False)
    if problem:
        raise ModelError(problem)
    name, library = str(cfg.repo_name), cfg.library_cfg
    folder = model_folder(name)
    if folder is not None:
        return Located(str(folder), local_only=True)
    fetched = fetched_folder(name)
    if library.revision is None and (fetched / "config.json").is_file() and not _in_hub_cache(cfg, weights=True):
        return Located(str(fetched), True, f"model.repo_name={name}: using {fetched}")
    offline = "model.library_cfg.local_files_only is set" if library.local_files_only else why_offline()
    if not offline:
        return Located(name, local_only=False)
    if _in_hub_cache(cfg, weights=False):
        note = f"model.repo_name={name}: {offline}; using the copy in the hub's cache"
        return Located(name, True, note, no_hub=not library.local_files_only)
    makes = f"{WITHOUT_HUB}; or " if name == SMOLLM2 else ""
    raise ModelError(
        f"model.repo_name={name}: {offline} and this model is not in the local cache; {makes}connect, give a "
        "local folder in the hub's layout (model.repo_name=<folder>), or use model=tiny, which needs no network"
    )


def _in_hub_cache(cfg: ModelConfig, *, weights: bool) -> bool:
    from huggingface_hub import try_to_load_from_cache

    wanted = WEIGHTS_FILES if weights else ("config.json",)
    found = (try_to_load_from_cache(str(cfg.repo_name), name, revision=cfg.library_cfg.revision) for name in wanted)
    return any(isinstance(path, str) and Path(path).is_file() for path in found)


def locate_adapter(adapter: str) -> Path:
    """The folder of `model.adapter`: itself, or a hub id's in the hub's cache.

    Raises ModelError if the hub has no such adapter, or does not answer and the cache lacks it.
    """
    folder = expand_home(adapter)
    if folder.is_dir():
        return folder
    from sheeprlhf.security.model_folder import adapter_folder_of

    offline = why_offline()
    try:
        return adapter_folder_of(adapter, local_only=bool(offline))
    except OSError as error:
        reason = f"{offline} and it is not in the local cache" if offline else str(error).strip().splitlines()[0]
        raise ModelError(f"model.adapter={adapter} cannot be loaded: {reason}; give a folder") from error
