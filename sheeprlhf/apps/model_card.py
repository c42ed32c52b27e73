"""The model card of an exported folder: what it is, how it was made, how good it is, and what it is not."""

import html
import importlib.metadata
import json
import platform
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

import sheeprlhf
from sheeprlhf.apps.terminal import clean, is_number
from sheeprlhf.config.model_lookup import Trained
from sheeprlhf.config.path_checks import data_is_here, model_folder
from sheeprlhf.config.registry import choices, datasets_of
from sheeprlhf.config.run_lookup import REPORT_FILE, read_run, read_run_config, saved_group
from sheeprlhf.config.shell import command
from sheeprlhf.security.json_records import load_json
from sheeprlhf.security.record_schemas import DATA_REPORT, RESULT
from sheeprlhf.structure.data import DocstringsConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import expand_home

if TYPE_CHECKING:
    from sheeprlhf.task.export import Checks

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
    """README.md of the folder.

    Args:
        trained: what was exported.
        checks: how it was compared.
        dtype: number format of the weights.
        offset: of a reward model.
        form: how prompts are written (a name of `FORMS`).
        tokenizer: the model's.
    """
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
        needs_bos=is_templated and _lacks_bos(trained, tokenizer),
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


def check_records(trained: Trained) -> None:
    """Read all that the card needs of a run, before its weights are read.

    Raises:
        RecordError: a file of it is damaged.
    """
    _records(trained)


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


def _lacks_bos(trained: Trained, tokenizer: Any) -> bool:
    """True if the tokenizer adds a BOS that the chat template does not write itself."""
    from sheeprlhf.data.prompt_encoder import template_args_of
    from sheeprlhf.data.tokenize import SpecialIds
    from sheeprlhf.utils.rendering import render_chat

    bos = SpecialIds(tokenizer).bos
    text = render_chat(tokenizer, [{"role": "user", "content": "x"}], template_args_of(trained), ask=True)
    return bool(bos) and tokenizer(text, add_special_tokens=False)["input_ids"][: len(bos)] != bos


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
