"""`export`: a run's model as a folder that plain transformers loads, with its model card."""

import html
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

import sheeprlhf
from sheeprlhf.apps.arguments import Flag, read_flags
from sheeprlhf.apps.chat import TEMPLATE, WEIGHTS, number_problems
from sheeprlhf.apps.terminal import Screen, clean, flag_entries, is_number, print_help
from sheeprlhf.config.command_words import command
from sheeprlhf.config.model_lookup import POLICY, Trained, find_trained
from sheeprlhf.config.path_checks import data_is_here, is_hub_id, model_folder, new_folder_problems
from sheeprlhf.config.registry import choices, datasets_of
from sheeprlhf.config.run_lookup import REPORT_FILE, is_newest, read_run, read_run_config, saved_group
from sheeprlhf.security.json_records import DATA_REPORT, RESULT, load_json
from sheeprlhf.security.version_guard import check_versions
from sheeprlhf.structure.data import DocstringsConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import expand_home, why_offline
from sheeprlhf.utils.output import make_folders, sweep_scratch

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
    """Write the folder, and upload it if asked. Raises SheepError if the model is unknown or fails a check."""
    given = read_flags("export", FLAGS, arguments)
    if given is None:
        meaning = (
            "A folder for plain transformers, and whatever reads its format: weights with adapters merged, tokenizer, "
            "generation settings and a model card. What it computes is compared with the run before it appears."
        )
        usage = "export <run or model> --to <folder> [--flag value ...]"
        return print_help(usage, [meaning], "Flags", flag_entries(FLAGS))
    values = given.values
    problems = number_problems("export <run> --to <folder>", given.words)
    problems += [*_folder_problems(values["to"]), *_repository_problems(values)]
    if problems:
        raise ConfigError(*problems)
    [word] = given.words
    trained = find_trained(word, values["weights"], wanted=None, chat_template=values[TEMPLATE.name])
    name, private = values["push"] or values["push-to-hub"], _is_private(values)
    if name is not None:
        _check_hub(name, private)
    check_versions()
    screen = Screen()
    if is_newest(word):
        screen.print(clean(f"{word}: {trained.word}", 400), style="faint")
    folder, dtype = expand_home(values["to"]).absolute(), values["dtype"] or trained.model.dtype
    checks = _export(trained, folder, dtype, name, screen)
    for line in _summary(trained, checks, folder, dtype):
        screen.print(line)
    if name is not None:
        screen.print(f"uploaded: {_push(folder, name, private)}")
    if trained.trains == POLICY:
        screen.print(f"next: {command(['chat', str(folder)])}")
    return 0


def _folder_problems(target: str | None) -> Iterator[str]:
    """Problems of the folder of --to."""
    if target is None:
        yield "--to is missing: give the folder to write, --to <folder>"
        return
    folder = expand_home(target)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        yield f"--to {folder} is there already and is not an empty folder: give a new one"
    else:
        yield from new_folder_problems("--to", target)


def _is_private(values: Mapping[str, Any]) -> bool:
    return values["private"] or values["push-to-hub"] is not None


def _repository_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Problems of the flags for an upload."""
    name = values["push"] or values["push-to-hub"]
    if values["push"] and values["push-to-hub"]:
        yield "--push and --push-to-hub name two repositories: give one of them"
    elif name is None and _is_private(values):
        yield "--private is not read without --push <owner/name>: remove it, or give both"
    elif name is not None and not is_hub_id(name):
        yield f"--push {clean(name)} cannot be a repository of the hub: give owner/name"


def _export(trained: Trained, folder: Path, dtype: str, name: str | None, screen: Screen) -> "Checks":
    """Write the folder with a card for the repository `name`; returns the comparisons with the run."""
    from transformers.utils import logging as transformers_logging

    from sheeprlhf.data.prompt_encoder import form_of
    from sheeprlhf.task.export import export_model

    def card(checks: "Checks", model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> str:
        offset = None if trained.trains == POLICY else float(getattr(model.config, "reward_offset", 0.0))
        form = form_of(trained, tokenizer)
        text = card_text(trained, checks, dtype, offset=offset, form=form, tokenizer=tokenizer)
        return text if name is None else text.replace('"<folder>"', f'"{name}"')

    transformers_logging.disable_progress_bar()
    _records(trained)  # before weights are read, as one may be damaged
    make_folders(folder.parent)
    sweep_scratch(folder.parent, f"{folder.name}.")  # of an export that was killed
    return export_model(trained, folder, dtype, card, lambda text: screen.print(clean(text, 400), style="faint"))


def _summary(trained: Trained, checks: "Checks", folder: Path, dtype: str) -> Iterator[str]:
    """Yield the lines on the folder that was written, and on how far it differs from the run."""
    if checks.merged is not None:
        yield f"adapters merged in float32: logits differ by {checks.merged:.2g} (largest {checks.largest:.3g})"
    if trained.task == "ppo":
        yield "this is the policy; the critic stays in the run's checkpoints"
    yield f"loaded back with plain transformers: logits differ by {checks.loaded:.2g}"
    if checks.head_bias:
        advice = "plain transformers leaves it out of logits; score = logits - reward_offset"
        yield f"the head's bias, {checks.head_bias:g}, is part of reward_offset in config.json: {advice}"
    size = sum(path.stat().st_size for path in folder.iterdir())
    yield f"exported: {folder} ({dtype}, {size / 1e6:,.1f} MB)"


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
    """Upload the folder, into a new repository if needed; return its address. Raises ConfigError if that fails."""
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


_TEMPLATE = Path(sheeprlhf.__file__).parent / "assets" / "model_card.md.jinja"
_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers")
_MAX_FILES = 200  # of results
_MAX_STAGES = 8
_FACTS = ("task", "data", "split", "weights")  # of an evaluation, in the order of the table
_NO_RESULTS = frozenset({*_FACTS, "model", "time", "version", "experiment_dir", "seed"})
_OPTIONS = {  # what tells most of a recipe
    "model": ("repo_name", "finetune_mode", "dtype", "quantization"),
    "data": (
        *("dataset_name", "revision", "subset", "split", "train_file", "mix"),
        *("num_samples", "max_length", "max_prompt_length"),
    ),
    "task": ("epochs", "max_num_steps", "mini_batch_size", "loss_type", "beta", "init_kl_coeff", "lr_warmup_steps"),
    "optim": ("config_name", "lr", "weight_decay"),
    "fabric": ("precision",),
    "reward": ("config_name", "path"),
}


def card_text(
    trained: Trained, checks: "Checks", dtype: str, *, offset: float | None, form: str, tokenizer: Any
) -> str:
    """README.md of the folder; `offset` is that of a reward model, `form` a name of `FORMS`."""
    from sheeprlhf.data.prompt_encoder import FORMS, Turn, template_args_of
    from sheeprlhf.utils.rendering import CLOCK, fixed_arguments

    base = str(trained.model.repo_name)
    is_templated = form == "template"
    variables = fixed_arguments(tokenizer, template_args_of(trained)) if is_templated else {}
    date = variables.pop(CLOCK, None)
    end, end_is_written = (None, False) if offset is None else _end_text(trained, form, tokenizer)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"cell": _cell, "code": _code, "home": _home, "json": json.dumps, "repr": repr}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        is_policy=offset is None,
        is_templated=is_templated,
        is_embedded=base == "embedded:tiny",
        base=base,
        is_on_hub=model_folder(base) is None,
        about=_about(trained),
        form=FORMS[form],
        prompt=FORMS[form].prompt([Turn("user", FORMS[form].example)]).get("prompt", FORMS[form].example),
        variables=variables,
        date=date,
        end=end,
        end_is_written=end_is_written,
        offset=offset,
        checks=checks,
        dtype=dtype,
        **_records(trained),
        version=sheeprlhf.__version__,
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES),
        python=platform.python_version(),
    )


def _records(trained: Trained) -> dict[str, Any]:
    """The part of the card that is read from the files of a run; empty without one."""
    data, run_dir = trained.data, trained.run_dir
    if data is None or run_dir is None:
        return {"data": None}
    parts = datasets_of(data)
    sources = [str(getattr(part, "train_file", None) or part.dataset_name) for part in parts]
    of_data = {
        "sources": zip(sources, ((type(part).__doc__ or "").splitlines()[0] for part in parts), strict=True),
        "is_embedded": isinstance(data, DocstringsConfig),
        "on_hub": [str(part.dataset_name) for part in parts if not data_is_here(part)],
        "splits": load_json(run_dir / REPORT_FILE, DATA_REPORT).get("splits", {}),
    }
    commands = [
        command([clean(word, 400) for word in read_run(stage).get("command", ["(not recorded)"])])
        for stage in _stages(run_dir)
    ]
    options, results = _options(run_dir), _results(run_dir)
    return {"data": of_data, "commands": commands, "options": options, "results": results}


def _end_text(trained: Trained, form: str, tokenizer: Any) -> tuple[str, bool]:
    """The token that ended the responses that a model was trained on, as text, and whether its template writes it."""
    from sheeprlhf.data.prompt_encoder import FORMS, Asker, Turn, template_args_of
    from sheeprlhf.utils.end_tokens import end_tokens

    example = Asker(FORMS[form], tokenizer, template_args_of(trained)).example([Turn("user", FORMS[form].example)])
    end = int(example.responses[0][-1])
    return str(tokenizer.convert_ids_to_tokens(end)), end == end_tokens(tokenizer).closing


def _about(trained: Trained) -> str:
    base = _code(_home(str(trained.model.repo_name)))
    if trained.run_dir is None or trained.data is None:
        return f"The model {base} as it is."
    task = choices("task", "train")[trained.task]
    what = f"Made from {base} by `task={trained.task}` on `data={_cell(trained.data.config_name)}`"
    return f"{what}; these are the run's {trained.weights} weights. {(task.__doc__ or '').splitlines()[0]}"


def _stages(run_dir: Path) -> list[Path]:
    """The runs that led to a run, the first one first, and the run itself."""
    stages = [run_dir]
    while len(stages) <= _MAX_STAGES:
        try:
            start = getattr(saved_group(str(stages[0]), "task"), "sft_experiment_dir", None)
        except ConfigError:  # the configuration of this stage cannot be read
            break
        if start is None or not Path(start, "config.yaml").is_file():
            break
        stages.insert(0, Path(start))
    return stages


def _options(run_dir: Path) -> list[tuple[str, Any]]:
    """The most important options of a run with their values."""
    saved = read_run_config(str(run_dir), key="run")
    groups: dict[str, Any] = {group: saved.get(group) for group in _OPTIONS}
    options = [
        (f"{group}.{name}", groups[group][name])
        for group, names in _OPTIONS.items()
        for name in names
        if isinstance(groups[group], dict) and groups[group].get(name) is not None
    ]
    model = groups["model"] if isinstance(groups["model"], dict) else {}
    if model.get("finetune_mode") == "LORA" and isinstance(model.get("lora_cfg"), dict):
        options.append(("model.lora_cfg", ", ".join(f"{key} {value}" for key, value in model["lora_cfg"].items())))
    return [*options, ("seed", saved.get("seed"))]


def _results(run_dir: Path) -> list[tuple[list[str], str, float]]:
    """The numbers of all evaluations: facts of the evaluation, name and value."""
    records = [load_json(path, RESULT) for path in islice(sorted((run_dir / "eval").glob("*.json")), _MAX_FILES)]
    return [
        ([record.get(key, "?") for key in _FACTS], key, value)
        for record in records
        for key, value in record.items()
        if key not in _NO_RESULTS and is_number(value)
    ]


def _home(text: str) -> str:
    """Without the name of this user's home."""
    home = str(expand_home("~"))
    return text.replace(home, "~") if len(home) > 1 else text


def _cell(value: object) -> str:
    """Text of a file in a table of Markdown: no markup, no new column."""
    return html.escape(clean(value, 200)).replace("|", "&#124;").replace("`", "'").replace("[", "&#91;")


def _code(text: str) -> str:
    return f"`{clean(text, 300).replace('`', chr(39))}`"
