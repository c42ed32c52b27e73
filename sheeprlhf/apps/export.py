"""`export`: a run's model as a folder that plain transformers loads, with its model card."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sheeprlhf.apps.flags import Flag, number_problems, print_flags_help, read_flags
from sheeprlhf.apps.serve.chat import TEMPLATE, WEIGHTS, weights_of
from sheeprlhf.apps.terminal import Screen, clean
from sheeprlhf.config.model_lookup import POLICY, find_trained
from sheeprlhf.config.path_checks import is_hub_id, new_folder_problems
from sheeprlhf.config.run_lookup import is_newest
from sheeprlhf.config.shell import command
from sheeprlhf.security.version_guard import check_versions
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.folders import sweep_scratch
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.hub import why_offline
from sheeprlhf.utils.output import make_folders

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sheeprlhf.task.export import Checks

FLAGS = (
    Flag("to", "The folder to write; it must not be there yet, or be empty.", value="folder"),
    WEIGHTS,
    TEMPLATE,
    Flag(
        "dtype",
        "Number format of the written weights; by default that which the run was trained in (model.dtype).",
        values=("float32", "bfloat16", "float16"),
    ),
    Flag("push", "Then also upload the folder to this repository of the hub (needs HF_TOKEN).", value="owner/name"),
    Flag("private", "With --push: nobody else sees the repository. Without it, a new one is public.", False, bool),
    Flag("push-to-hub", "The same as --push <owner/name> --private.", value="owner/name"),
)


def run(arguments: list[str]) -> int:
    """Write the folder, and upload it if asked.

    Raises:
        SheepError: the words name no model, the folder is in use, or the model does not survive the checks.
    """
    given = read_flags("export", FLAGS, arguments)
    if given is None:
        _print_help()
        return 0
    problems = number_problems("export <run> --to <folder>", given.words)
    target, name = given.values["to"], given.values["push"] or given.values["push-to-hub"]
    private = given.values["private"] or given.values["push-to-hub"] is not None
    if target is None:
        problems.append("--to is missing: give the folder to write, --to <folder>")
    else:
        problems += list(_target_problems(target))
    if given.values["push"] and given.values["push-to-hub"]:
        problems.append("--push and --push-to-hub name two repositories: give one of them")
    elif name is None and private:
        problems.append("--private is not read without --push <owner/name>: remove it, or give both")
    elif name is not None and not is_hub_id(name):
        problems.append(f"--push {clean(name)} cannot be a repository of the hub: give owner/name")
    if problems:
        raise ConfigError(*problems)
    trained = find_trained(
        given.words[0], weights_of(given.values), wanted=None, chat_template=given.values[TEMPLATE.name]
    )
    if name is not None:
        _check_hub(name, private)
    check_versions()

    from transformers.utils import logging as transformers_logging

    from sheeprlhf.apps.model_card import card_text, check_records
    from sheeprlhf.data.prompt_encoder import form_of
    from sheeprlhf.task.export import export_model

    transformers_logging.disable_progress_bar()
    check_records(trained)
    folder = expand_home(target).absolute()
    dtype = given.values["dtype"] or trained.model.dtype

    def card(checks: "Checks", model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> str:
        offset = None if trained.trains == POLICY else float(getattr(model.config, "reward_offset", 0.0))
        form = form_of(trained, tokenizer)
        text = card_text(trained, checks, dtype, offset=offset, form=form, tokenizer=tokenizer)
        return text if name is None else text.replace('"<folder>"', f'"{name}"')

    screen = Screen()
    if is_newest(given.words[0]):
        screen.print(clean(f"{given.words[0]}: {trained.word}", 400), style="faint")
    make_folders(folder.parent)
    sweep_scratch(folder.parent, f"{folder.name}.")  # of an export that was killed
    checks = export_model(trained, folder, dtype, card, lambda text: screen.print(clean(text, 400), style="faint"))
    if checks.merged is not None:
        screen.print(f"adapters merged in float32: logits differ by {checks.merged:.2g} (largest {checks.largest:.3g})")
    if trained.task == "ppo":
        screen.print("this is the policy; the critic stays in the run's checkpoints")
    size = sum(path.stat().st_size for path in folder.iterdir())
    screen.print(f"loaded back with plain transformers: logits differ by {checks.loaded:.2g}")
    if checks.head_bias:
        screen.print(
            f"the head's bias, {checks.head_bias:g}, is part of reward_offset in config.json: plain transformers "
            "leaves it out of logits; score = logits - reward_offset"
        )
    screen.print(f"exported: {folder} ({dtype}, {size / 1e6:,.1f} MB)")
    if name is not None:
        screen.print(f"uploaded: {_push(folder, name, private)}")
    if trained.trains == POLICY:
        screen.print(f"next: {command(['chat', str(folder)])}")
    return 0


def _print_help() -> None:
    print_flags_help(
        "export <run or model> --to <folder> [--flag value ...]",
        "A folder for plain transformers, and whatever reads its format: weights with adapters merged, tokenizer, "
        "generation settings and a model card. What it computes is compared with the run before it appears.",
        FLAGS,
    )


def _target_problems(target: str) -> Iterator[str]:
    folder = expand_home(target)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        yield f"--to {folder} is there already and is not an empty folder: give a new one"
    else:
        yield from new_folder_problems("--to", target)


def _check_hub(name: str, private: bool) -> None:
    """Raises ConfigError if the folder could not be uploaded, or --private is given and the repository is public."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    reason = why_offline()
    if not reason and get_token() is None:
        reason = "no token of the hub is set (HF_TOKEN, or `hf auth login`)"
    if reason:
        raise ConfigError(f"--push {name}: {reason}; nothing was exported: without --push, only the folder is written")
    api = _hub()
    try:
        api.whoami()
        if private and not api.model_info(name).private:
            raise ConfigError(f"--private: {name} exists and is public; change that on its page, or give another name")
    except RepositoryNotFoundError:
        return
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"--push {name}: the hub does not accept the token: {clean(error, 200)}") from error


def _push(folder: Path, name: str, private: bool) -> str:
    """Upload the folder, and make the repository if there is none of that name. Returns its address.

    Raises:
        ConfigError: the hub does not answer or refuses; the folder stays.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = _hub()
    try:
        address = api.create_repo(name, private=True if private else None, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by SheepRLHF")
    except (HfHubHTTPError, OSError, ValueError) as error:
        later = f"the folder stays; later: hf upload {name} {shlex.quote(str(folder))}"
        raise ConfigError(f"--push {name}: {clean(error, 200)}; {later}") from error
    return str(address)


def _hub() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
