"""Files of a hub dataset that are downloaded one by one (`data.streaming`).

A folder has a placeholder for each file of the dataset, without content but of the size of the file, so that files are
chosen by their names as in any other folder. `download` replaces placeholders, `release` makes them again.
"""

import os
from functools import cache
from pathlib import Path, PurePosixPath

from sheeprlhf.config.path_checks import file_kind
from sheeprlhf.structure.data import HubDataConfig
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.home import why_offline
from sheeprlhf.utils.output import make_folders


@cache
def _listing(name: str, revision: str | None) -> tuple[str, tuple[tuple[str, int], ...]]:
    """The commit of a dataset, and the paths and sizes of its files. Raises DataError, within 5 seconds if offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if offline := why_offline():
        raise DataError(f"{offline}: data.streaming=true downloads the files of dataset {name} one by one")
    try:
        info = HfApi().dataset_info(name, revision=revision, files_metadata=True)
    except (HfHubHTTPError, OSError) as error:
        raise DataError(
            f"dataset {name} cannot be listed ({error}); check data.dataset_name and data.revision (a gated dataset "
            "needs `hf auth login`)"
        ) from None
    return str(info.sha), tuple((file.rfilename, file.size or 0) for file in info.siblings or ())


def listed_folder(cfg: HubDataConfig, card: str) -> Path:
    """The folder of a dataset with its card, and placeholders for other files. Raises DataError."""
    from sheeprlhf.data.store import cache_root  # imports torch

    commit, files = _listing(str(cfg.dataset_name), cfg.revision)
    folder = cache_root(cfg.cache_dir) / "hub" / f"{str(cfg.dataset_name).replace('/', '--')}-{commit}"
    make_folders(folder)
    for name, size in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not (file_kind(Path(name)) or name == card):
            continue
        make_folders((folder / name).parent)
        try:
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # another process made it, or it is downloaded
            continue
        os.truncate(descriptor, size)
        os.close(descriptor)
    if any(name == card for name, _ in files):
        download(cfg, [folder / card])
    return folder


def download(cfg: HubDataConfig, files: list[Path]) -> None:
    """Download placeholders of `listed_folder`; time stamps verify the others. Raises DataError if that fails."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    name = str(cfg.dataset_name)
    commit, _ = _listing(name, cfg.revision)
    folder = next(parent for parent in files[0].parents if parent.name.endswith(commit))
    for file in files:
        path = file.relative_to(folder).as_posix()
        try:
            hf_hub_download(name, path, repo_type="dataset", revision=commit, local_dir=folder)
        except (HfHubHTTPError, OSError) as error:
            raise DataError(f"{path} of dataset {name} cannot be downloaded: {error}; try again") from None


def release(file: Path) -> None:
    """Make a downloaded file a placeholder again."""
    size = file.stat().st_size
    folder = next(parent for parent in file.parents if (parent / ".cache").is_dir())
    record = folder / ".cache" / "huggingface" / "download" / f"{file.relative_to(folder)}.metadata"
    record.unlink(missing_ok=True)  # else the placeholder would count as the file
    with file.open("wb") as placeholder:
        placeholder.truncate(size)
