"""The model card of an exported folder: what it is, how it was made, how good it is, and what it is not."""

import html
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sheeprlhf
from sheeprlhf.apps.terminal import clean
from sheeprlhf.config.model_lookup import POLICY, Trained
from sheeprlhf.config.path_checks import data_is_here, model_folder
from sheeprlhf.config.registry import choices, datasets_of
from sheeprlhf.config.run_lookup import REPORT_FILE, read_run, read_run_config, saved_group
from sheeprlhf.config.shell import command
from sheeprlhf.security.json_records import load_json
from sheeprlhf.security.record_schemas import DATA_REPORT, RESULT
from sheeprlhf.structure.data import DataConfig, DocstringsConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import expand_home

if TYPE_CHECKING:
    from sheeprlhf.task.export import Checks

_MAX_FILES = 200  # of results
_MAX_STAGES = 8
_ABOUT = frozenset({"task", "split", "data", "model", "weights", "time", "version", "experiment_dir", "seed"})
_OPTIONS = {  # what tells most of a recipe
    "model": ("repo_name", "finetune_mode", "dtype"),
    "data": ("dataset_name", "train_file", "revision", "num_samples", "max_length", "max_prompt_length"),
    "task": ("epochs", "max_num_steps", "mini_batch_size", "loss_type", "beta", "init_kl_coeff", "lr_warmup_steps"),
    "optim": ("config_name", "lr", "weight_decay"),
    "fabric": ("precision",),
    "reward": ("config_name", "path"),
}
_USE = {
    POLICY: "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'tokenizer = AutoTokenizer.from_pretrained("<folder>")\n'
    'model = AutoModelForCausalLM.from_pretrained("<folder>")\n'
    "{inputs}\n"
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
    "": "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
    'tokenizer = AutoTokenizer.from_pretrained("<folder>")\n'
    'model = AutoModelForSequenceClassification.from_pretrained("<folder>")\n'
    "{inputs}\n"
    "print(model(**inputs).logits.item() - ({offset!r}))",
}
_PROMPT = {
    False: 'inputs = tokenizer({prompt!r}, return_tensors="pt")',
    True: 'messages = [{{"role": "user", "content": {prompt!r}}}]\n'
    "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True{variables})\n"
    'inputs = tokenizer(text, add_special_tokens={bos}, return_tensors="pt")',
}
_ANSWERED = {
    False: 'inputs = tokenizer("<prompt>" + "<response>" + {end!r}, return_tensors="pt")',
    True: 'messages = [{{"role": "user", "content": "<prompt>"}}, {{"role": "assistant", "content": "<response>"}}]\n'
    "text = tokenizer.apply_chat_template(messages, tokenize=False{variables})\n"
    "text = text.rpartition({end!r})[0] + {end!r}\n"
    'inputs = tokenizer(text, add_special_tokens={bos}, return_tensors="pt")',
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

    run_dir = trained.run_dir
    kind = "language model" if trained.trains == POLICY else "reward model"
    prompt = FORMS[form].prompt([Turn("user", FORMS[form].example)]).get("prompt", FORMS[form].example)
    is_templated = form == "template"
    variables = fixed_arguments(tokenizer, template_args_of(trained)) if is_templated else {}
    date = variables.pop(CLOCK, None)
    bos = is_templated and _lacks_bos(trained, tokenizer)
    given = "".join(f", {name}={value!r}" for name, value in variables.items())
    if offset is None:
        inputs = _PROMPT[is_templated].format(prompt=prompt, variables=given, bos=bos)
        use = _USE[POLICY].format(inputs=inputs)
    else:
        end, is_written = _end_text(trained, form, tokenizer)
        inputs = _ANSWERED[is_templated].format(end=end, variables=given, bos=bos)
        if not is_written:
            inputs = inputs.replace(f"text.rpartition({end!r})[0]", "text")
        use = _USE[""].format(inputs=inputs, offset=offset)
    lines = [*_front(trained), f"# A {kind} made with SheepRLHF", ""]
    lines += [f"{_what(trained)} Prompts are written as {FORMS[form].meaning}.", ""]
    if date is not None:
        lines += [f"The chat template was rendered with the date {_cell(date)} in place of today's.", ""]
    if offset is not None:
        lines += [
            f"`logits` is the raw score of a response, read at its last token that is not padding. SheepRLHF subtracts "
            f"`{offset:.6g}` (`reward_offset` in config.json), so that the responses it was normalised on score 0.",
            "",
        ]
    if checks.head_bias:
        lines += [
            f"The head of the original model has a bias of `{checks.head_bias:.6g}`. transformers' classification "
            "models have none, so `logits` of plain transformers leave it out; `reward_offset` includes it with the "
            "sign changed.",
            "",
        ]
    lines += ["```python", use, "```", ""]
    if run_dir is not None:
        lines += ["## Data", "", *_data(trained), "## Recipe", "", *_recipe(run_dir), "## Results", ""]
        lines += [*_results(run_dir), ""]
    lines += ["## Checks of this folder", "", *_checks(checks, dtype), ""]
    lines += ["## Limits", "", *_limits(trained), "", "## Licence", "", *_licence(trained), "", "## Versions", ""]
    names = ("torch", "transformers", "peft", "safetensors", "tokenizers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines += [f"Written by sheeprlhf {sheeprlhf.__version__} with {versions}, Python {platform.python_version()}."]
    lines += ["The configuration files are those of transformers 5: older versions may misread them.", ""]
    return "\n".join(lines)


def check_records(trained: Trained) -> None:
    """Read all that the card needs of a run, before its weights are read.

    Raises:
        RecordError: a file of it is damaged.
    """
    if trained.run_dir is not None:
        for part in (_data(trained), _recipe(trained.run_dir), _results(trained.run_dir)):
            list(part)


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


def _hub_datasets(data: DataConfig) -> list[str]:
    """Ids of the datasets that are on the hub alone."""
    return [str(part.dataset_name) for part in datasets_of(data) if not data_is_here(part)]


def _front(trained: Trained) -> Iterator[str]:
    """Metadata for the hub: only ids of the hub, no folders of this machine."""
    yield "---"
    yield "library_name: transformers"
    yield f"pipeline_tag: {'text-generation' if trained.trains == POLICY else 'text-classification'}"
    base = str(trained.model.repo_name)
    if model_folder(base) is None:
        yield f"base_model: {json.dumps(base)}"
    if trained.data is not None and (names := _hub_datasets(trained.data)):
        yield f"datasets: {json.dumps(names)}"
    yield "tags: [sheeprlhf]"
    yield "---"


def _what(trained: Trained) -> str:
    if trained.run_dir is None or trained.data is None:
        return f"The model {_code(_home(str(trained.model.repo_name)))} as it is."
    task = choices("task", "train")[trained.task]
    base = _code(_home(str(trained.model.repo_name)))
    what = f"Made from {base} by `task={trained.task}` on `data={_cell(trained.data.config_name)}`"
    return f"{what}; these are the run's {trained.weights} weights. {(task.__doc__ or '').splitlines()[0]}"


def _data(trained: Trained) -> Iterator[str]:
    data, run_dir = trained.data, trained.run_dir
    assert data is not None and run_dir is not None
    for part in datasets_of(data):
        source = getattr(part, "train_file", None) or part.dataset_name
        yield f"{_code(_home(str(source)))}: {(type(part).__doc__ or '').splitlines()[0]}"
    splits = load_json(run_dir / REPORT_FILE, DATA_REPORT).get("splits", {})
    rows = [f"| {_cell(name)} | {split['read']} | {split['kept']} |" for name, split in splits.items()]
    yield from ["", "| split | rows read | rows kept |", "| --- | --- | --- |", *rows] if rows else []
    yield ""


def _recipe(run_dir: Path) -> Iterator[str]:
    """The commands of all stages, the first one first, and the options of the last one."""
    stages: list[Path] = [run_dir]
    while len(stages) <= _MAX_STAGES:
        try:
            start = getattr(saved_group(str(stages[0]), "task"), "sft_experiment_dir", None)
        except ConfigError:  # a stage that was moved away: those after it are told
            break
        if start is None or not Path(start, "config.yaml").is_file():
            break
        stages.insert(0, Path(start))
    yield "```bash"
    for stage in stages:
        words = [clean(word, 400) for word in read_run(stage).get("command", ["(not recorded)"])]
        yield _home(command(words)).replace("`", "'")
    yield "```"
    yield ""
    yield "| option | value |"
    yield "| --- | --- |"
    saved = read_run_config(str(run_dir), key="run")
    for group, names in _OPTIONS.items():
        of_group: Any = saved.get(group)
        for name in names if isinstance(of_group, dict) else ():
            value = of_group.get(name)
            if value is not None:
                yield f"| {group}.{name} | {_cell(_home(str(value)))} |"
    of_model: Any = saved.get("model")
    lora = of_model.get("lora_cfg") if isinstance(of_model, dict) and of_model.get("finetune_mode") == "LORA" else None
    if isinstance(lora, dict):
        yield f"| model.lora_cfg | {_cell(', '.join(f'{key} {value}' for key, value in lora.items()))} |"
    yield f"| seed | {_cell(saved.get('seed'))} |"
    yield ""


def _results(run_dir: Path) -> Iterator[str]:
    rows = []
    for path in islice(sorted((run_dir / "eval").glob("*.json")), _MAX_FILES):
        record = load_json(path, RESULT)
        about = [_cell(record.get(key, "?")) for key in ("task", "data", "split", "weights")]
        numbers = {key: value for key, value in record.items() if key not in _ABOUT and _is_number(value)}
        rows += [f"| {' | '.join(about)} | {_cell(key)} | {value:.6g} |" for key, value in numbers.items()]
    if not rows:
        yield "None: nothing was measured before the export (`eval task=... experiment_dir=<run>`)."
        return
    yield "| evaluation | data | split | weights | figure | value |"
    yield "| --- | --- | --- | --- | --- | --- |"
    yield from rows


def _checks(checks: "Checks", dtype: str) -> Iterator[str]:
    yield f"On {checks.rows} rows; the largest logit is {checks.largest:.4g}."
    yield ""
    if checks.merged is not None:
        yield f"- Adapters beside the weights and merged into them, in float32: logits differ by {checks.merged:.2g}."
    yield f"- In float32 and rounded to {dtype}: logits differ by {checks.rounded:.2g}."
    yield f"- In memory and loaded from this folder: logits differ by {checks.loaded:.2g}."


def _limits(trained: Trained) -> Iterator[str]:
    if trained.trains != POLICY:
        yield "- Scores compare responses to one prompt; between prompts they mean little, and a high one is no proof."
        yield "- Whoever optimises against it finds texts that it overrates."
    else:
        yield "- It says what resembles its training data. Nothing it says was checked for truth, harm or bias."
    yield "- The figures above are of the data that they name. Nothing else was measured."
    if str(trained.model.repo_name) == "embedded:tiny":
        yield "- It is made of a model of 5.8M parameters that exists to try the framework out."


def _licence(trained: Trained) -> Iterator[str]:
    base = str(trained.model.repo_name)
    yield f"- Base model: {_licence_of_base(base)}"
    if isinstance(trained.data, DocstringsConfig):
        yield "- Data: one-line summaries and signatures of open-source packages, each under its own licence; "
        yield "  `assets/docstrings/NOTICE` of SheepRLHF lists them."
    elif trained.data is not None and (names := _hub_datasets(trained.data)):
        pages = ", ".join(map(_code, names))
        yield f"- Data: as the hub's page of {pages} says; read it before you publish."
    elif trained.data is not None:
        yield "- Data: your own files; whether the model may be published depends on them."


def _licence_of_base(base: str) -> str:
    if base == "embedded:tiny":
        return "part of SheepRLHF, Apache-2.0."
    if model_folder(base) is not None:
        return "that of the folder that it was loaded from."
    return f"as the hub's page of {_code(base)} says."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _home(text: str) -> str:
    """Without the name of this user's home."""
    home = str(expand_home("~"))
    return text.replace(home, "~") if len(home) > 1 else text


def _cell(value: object) -> str:
    """Text of a file in a table of Markdown: no markup, no new column."""
    return html.escape(clean(value, 200)).replace("|", "&#124;").replace("`", "'").replace("[", "&#91;")


def _code(text: str) -> str:
    return f"`{clean(text, 300).replace('`', chr(39))}`"
