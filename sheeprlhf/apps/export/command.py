"""`export`: a run's model as a folder that plain transformers loads, with its model card."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sheeprlhf.apps.flags import Flag, print_flags_help, read_flags
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
    Flag(
        "push-to-hub",
        "Then also upload the folder to this repository of the hub (owner/name; a new one is private).",
        value="name",
    ),
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
    problems = []
    target, name = given.values["to"], given.values["push-to-hub"]
    if len(given.words) != 1:
        what = f"{len(given.words)} were given" if given.words else "`list runs` shows the runs"
        problems.append(f"`export` takes one run or model: `export <run> --to <folder>`; {what}")
    if target is None:
        problems.append("--to is missing: give the folder to write, --to <folder>")
    else:
        problems += list(_target_problems(target))
    if name is not None and not is_hub_id(name):
        problems.append(f"--push-to-hub {clean(name)} cannot be a repository of the hub: give owner/name")
    if problems:
        raise ConfigError(*problems)
    trained = find_trained(
        given.words[0], weights_of(given.values), wanted=None, chat_template=given.values[TEMPLATE.name]
    )
    check_versions()

    from transformers.utils import logging as transformers_logging

    from sheeprlhf.apps.export.model_card import card_text, check_records
    from sheeprlhf.data.prompt_encoder import form_of
    from sheeprlhf.task.export import export_model

    transformers_logging.disable_progress_bar()
    check_records(trained)
    folder = expand_home(target).absolute()
    dtype = given.values["dtype"] or trained.model.dtype

    def card(checks: "Checks", model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> str:
        offset = None if trained.trains == POLICY else float(getattr(model.config, "reward_offset", 0.0))
        return card_text(trained, checks, dtype, offset=offset, form=form_of(trained, tokenizer), tokenizer=tokenizer)

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
        _push(folder, name)
        screen.print(f"uploaded: {name}")
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


def _push(folder: Path, name: str) -> None:
    """Upload the folder; a repository that is not there yet becomes a private one.

    Raises:
        ConfigError: the hub does not answer or refuses; the folder stays.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    later = f"the folder stays; later: hf upload {name} {shlex.quote(str(folder))}"
    reason = why_offline()
    if not reason and get_token() is None:
        reason = "no token of the hub is set (HF_TOKEN, or `hf auth login`)"
    if reason:
        raise ConfigError(f"--push-to-hub {name}: {reason}; {later}")
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by SheepRLHF")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"--push-to-hub {name}: {clean(error, 200)}; {later}") from error
