"""Checks of RL tasks, rewards and evaluations; functions of the user are found without an import."""

import ast
import importlib.util
import keyword
import math
import os
import re
import sys
import tokenize
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from urllib.parse import urlsplit

from sheeprlhf.config.command_words import shell_word
from sheeprlhf.config.option_checks import did_you_mean, nearest, not_installed, unread, url_problem
from sheeprlhf.config.path_checks import is_weights_name, model_problem, new_folder_problems, weights_problems
from sheeprlhf.config.registry import choices, config_to_dict
from sheeprlhf.config.run_lookup import (
    is_run_alias,
    read_run_config,
    saved_group,
    scores_by_run,
    start_problems,
    task_of_run,
)
from sheeprlhf.config.validate import unread_options
from sheeprlhf.structure.evaluation import (
    NOTHING,
    REFERENCES,
    START,
    EvalTaskConfig,
    FrontierConfig,
    GenerateConfig,
    RewardConfig,
)
from sheeprlhf.structure.reward import (
    BUILTINS,
    JUDGE,
    MODEL,
    BuiltinOptionsConfig,
    CallOptionsConfig,
    FunctionRewardConfig,
    JudgeOptionsConfig,
    JudgeRewardConfig,
    ListRewardConfig,
    ModelRewardConfig,
    NoRewardConfig,
    RewardSourceConfig,
    Term,
    is_model,
    is_users_own,
    judge_fields,
    parse_term,
    term_folder,
)
from sheeprlhf.structure.rollout import (
    ENVIRONMENTS,
    BestOfNConfig,
    DistillConfig,
    GRPOConfig,
    LocalRolloutConfig,
    OnlineTaskConfig,
    PPOConfig,
    RatioTaskConfig,
    ReinforcePPConfig,
    VLLMRolloutConfig,
)
from sheeprlhf.structure.run import AdamWConfig, EvalConfig, GenConfig, InspectConfig, TrainConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.memory import missing_modules
from sheeprlhf.utils.output import link_problems

_READERS = {
    option: [name for name, builtin in BUILTINS.items() if option in builtin.reads]
    for option in dict.fromkeys(option for builtin in BUILTINS.values() for option in builtin.reads)
}
_EXAMPLES = {"target_length": "12", "pattern": r"'^Return\b'"}


def reward_problems(cfg: RewardSourceConfig) -> Iterator[str]:
    """Every problem of a source of rewards: its functions, their options, penalties without effect."""
    sources: list[str] = []
    if isinstance(cfg, FunctionRewardConfig):
        sources = [cfg.path]
        if cfg.path in (MODEL, JUDGE):
            yield f"reward.path={cfg.path} names no function: give reward={cfg.path}"
        else:
            yield from source_problems("reward.path=", cfg.path)
    elif isinstance(cfg, ListRewardConfig):
        terms = list(_readable_terms(cfg.terms))
        sources = [term.source for term in terms if isinstance(term, Term)]
        yield from (problem for problem in terms if isinstance(problem, str))
        yield from _terms_problems(sources)
    elif isinstance(cfg, JudgeRewardConfig):
        sources = [JUDGE]
    if isinstance(cfg, CallOptionsConfig) and not any(source == JUDGE or is_users_own(source) for source in sources):
        for name in ("num_workers", "timeout"):
            if getattr(cfg, name) != getattr(CallOptionsConfig, name):
                yield f"reward.{name}={getattr(cfg, name)} is read by functions of yours and the judge only: remove it"
    if isinstance(cfg, JudgeOptionsConfig) and JUDGE in sources:
        yield from _judge_problems(cfg)
    elif isinstance(cfg, JudgeOptionsConfig):
        shared = config_to_dict(CallOptionsConfig())
        own = [name for name in config_to_dict(JudgeOptionsConfig()) if name not in shared]
        changed = [name for name in own if config_to_dict(cfg)[name] != config_to_dict(JudgeOptionsConfig())[name]]
        yield from (f"reward.{name} is read by no term: remove it, or add the term judge" for name in changed)
    if isinstance(cfg, BuiltinOptionsConfig):
        yield from _option_problems(cfg, sources)
    if isinstance(cfg, ListRewardConfig) and not any(map(is_model, sources)):
        for name in ("template", "step_score"):
            if (value := getattr(cfg, name)) != getattr(ListRewardConfig, name):
                yield f"reward.{name}={value} is read by reward models only: remove it, or add the term model"
    if isinstance(cfg, ListRewardConfig):
        num_models = sum(map(is_model, sources))
        if cfg.combine != "sum" and num_models < 2:
            advice = "add for example model:<folder>, or give reward.combine=sum"
            yield f"reward.combine={cfg.combine} compares reward models, and reward.terms has {num_models}: {advice}"
    if isinstance(cfg, ModelRewardConfig | ListRewardConfig) and cfg.folder is not None:
        if isinstance(cfg, ListRewardConfig) and MODEL not in sources:
            yield f"reward.folder={cfg.folder} is read by no term: remove it, or add the term model"
        else:
            if problem := model_problem(cfg.folder, weights=True, key="reward.folder"):
                yield problem


def _readable_terms(texts: list[str]) -> Iterator[Term | str]:
    """Each term, or what is wrong with it."""
    if not texts:
        yield "reward.terms=[] has nothing to add up: give for example reward.terms=[model,0.5*length]"
    for text in texts:
        try:
            yield parse_term(text)
        except ValueError:
            advice = "give a source, or weight*source with a finite weight other than 0, for example 0.5*length"
            yield f"reward.terms: {text or 'an empty text'} is not a term: {advice}"


def _terms_problems(sources: list[str]) -> Iterator[str]:
    for source in dict.fromkeys(sources):
        if (folder := term_folder(source)) is not None:
            if problem := model_problem(folder, weights=True, key="reward.folder"):
                yield problem.replace("reward.folder=", "reward.terms: model:")
        elif source not in (MODEL, JUDGE):
            yield from source_problems("reward.terms: ", source)
        if sources.count(source) > 1:
            yield f"reward.terms: {source} is there more than once: give it once, with the sum of the weights"


def source_problems(given: str, source: str) -> Iterator[str]:
    """Problems of a built-in reward function or a dotted path; `given` is the option, which begins each sentence."""
    if source in BUILTINS:
        builtin = BUILTINS[source]
        if missing := missing_modules(builtin.requires):
            yield not_installed(f"{given}{source}", missing, builtin.extra)
    elif source.endswith(".py") or "/" in source or ".py:" in source:
        module, _, function = source.partition(":")
        dotted = module.removeprefix("./").removesuffix(".py").replace("/", ".")
        yield f"{given}{source} is a file: give its dotted path, {given}{dotted}:{function or '<function>'}"
    elif not is_users_own(source):
        known = list(BUILTINS) if given.endswith("=") else [MODEL, JUDGE, *BUILTINS]
        did = did_you_mean(source, known, "it", key=given if given.endswith("=") else "")
        own = "a function of yours as package.module:function"
        yield f"{given}{source} is unknown: {did} may be {', '.join(known)}, or {own}"
    else:
        yield from _users_own_problems(given, source)


def _users_own_problems(given: str, source: str) -> Iterator[str]:
    try:
        module, function = _parse_path(source)
    except ValueError:
        yield f"{given}{source} cannot be read: give package.module:function, for example {given}my_rewards:brevity"
        return
    spec = _find_module(module)
    if spec is None:
        files = [path.stem for path in Path.cwd().glob("*.py")]
        did = did_you_mean(module, files if "." not in module else (), "it", key=given, end=f":{function}")
        advice = f"{did} has to be installed, on PYTHONPATH or in the current directory ({Path.cwd()})"
        yield f"{given}{source}: there is no module {module}: {advice}"
        return
    if spec.origin is None or not spec.origin.endswith(".py"):
        return  # compiled, or built in: importing it will tell
    try:
        names = _names_of(spec.origin)
    except SyntaxError as error:
        yield f"{given}{source}: {spec.origin}, line {error.lineno}, is not Python: {error.msg}"
        return
    except OSError as error:
        yield f"{given}{source}: {spec.origin} cannot be read: {error.strerror}"
        return
    if names is not None and function not in names:
        near, hidden = nearest(function, names), _hidden_by_installed(module)
        did = f"did you mean {given}{module}:{near}?" if near else "give the name of one that it has"
        if hidden is not None:
            did = f"it comes before your {hidden}: rename that"
        yield f"{given}{source}: {spec.origin} has no {function}: {did}"


def _parse_path(text: str) -> tuple[str, str]:
    """`package.module:function` or `package.module.function`. Raises ValueError if it is neither."""
    module, _, function = text.rpartition(":" if ":" in text else ".")
    parts = [*module.split("."), function]
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        raise ValueError(text)
    return module, function


def _find_module(module: str) -> ModuleSpec | None:
    """Locate a module as `import` would; None if there is none. Unlike importlib, it does not import parents."""
    loaded = getattr(sys.modules.get(module), "__spec__", None)
    if isinstance(loaded, ModuleSpec):
        return loaded  # such as os.path, which is in no package
    first, *rest = module.split(".")
    spec = _installed(first) or PathFinder.find_spec(first, [os.getcwd()])
    name = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _installed(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module without a specification, such as __main__
        return None


def _hidden_by_installed(module: str) -> str | None:
    """The user's own file in the current directory, where an installed module of its name comes before it."""
    first = module.partition(".")[0]
    own, installed = PathFinder.find_spec(first, [os.getcwd()]), _installed(first)
    if own is None or own.origin is None or installed is None or own.origin == installed.origin:
        return None
    return os.path.relpath(own.origin)


def _names_of(file: str) -> set[str] | None:
    """Names that a source file may define; None if they cannot be determined. Raises SyntaxError and OSError."""
    with tokenize.open(file) as source:
        try:
            tree = ast.parse(source.read(), file)
        except (UnicodeDecodeError, ValueError) as error:
            raise SyntaxError(str(error)) from error
    names = set(_bound_names(tree))
    return None if names & {"*", "__getattr__"} else names


def _bound_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("globals", "setattr"):
            yield "*"


def _judge_problems(cfg: JudgeOptionsConfig) -> Iterator[str]:
    """Options of a judge that are missing or cannot be read; no value that may be a secret is repeated."""
    if problem := url_problem("reward.url", cfg.url, "give for example reward.url=http://127.0.0.1:8000/v1"):
        yield problem
    elif urlsplit(str(cfg.url)).path.rstrip("/").endswith("/chat/completions"):
        yield f"reward.url={cfg.url}: /chat/completions is appended: give the address up to /v1"
    if not cfg.judge_model:
        yield "reward.judge_model is missing: give the name of the server's model"
    try:
        if "response" not in judge_fields(cfg.question()):
            yield "reward.judge_prompt does not contain {response}: add it"
    except ValueError as error:
        yield f"reward.judge_prompt cannot be read ({error}): write {{name}} for a field and {{{{ }}}} for braces"
    yield from _pattern_problems("reward.judge_pattern", cfg.judge_pattern)
    limits = cfg.judge_range
    if len(limits) != 2 or not (math.isfinite(sum(limits)) and limits[0] < limits[1]):
        yield f"reward.judge_range={list(limits)} must be the lowest and the highest score: give for example [0,10]"
    if cfg.judge_failure_score is not None and not math.isfinite(cfg.judge_failure_score):
        yield f"reward.judge_failure_score={cfg.judge_failure_score} must be a finite number"
    variable = cfg.api_key_variable
    if variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", variable):
        yield "reward.api_key_variable is not the name of an environment variable: give the name, never the key itself"
    elif variable is not None and not re.fullmatch(r"[\x21-\x7e]+", os.environ.get(variable, "").strip()):
        yield f"reward.api_key_variable={variable}: the environment variable is empty or no key: export it"


def _option_problems(cfg: BuiltinOptionsConfig, sources: list[str]) -> Iterator[str]:
    """Options of built-ins: what is set and not read, what is needed and missing, what cannot be read."""
    values = {"target_length": cfg.target_length, "length_unit": cfg.length_unit, "pattern": cfg.pattern}
    for name, value in values.items():
        readers = _READERS[name]
        reading = [source for source in sources if source in readers]
        if value != getattr(BuiltinOptionsConfig, name) and not reading:
            yield f"reward.{name}={value} is read by {' and '.join(readers)} only: remove it, or choose that function"
        elif value is None and any(name in BUILTINS[source].needs for source in reading):
            yield f"reward.{name} is missing: {reading[0]} needs it, for example reward.{name}={_EXAMPLES[name]}"
    yield from _pattern_problems("reward.pattern", cfg.pattern or "")


def _pattern_problems(key: str, pattern: str) -> Iterator[str]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield f"{key}={pattern} is not a regular expression: {error}; quote and escape it"


def online_problems(config: TrainConfig, task: OnlineTaskConfig) -> Iterator[str]:
    """Problems of an RL task."""
    model = config.model
    yield from model_score_problems(config)
    group = task.num_generations
    for key in (key for key in ("rollout_size", "mini_batch_size") if key not in task.unread):
        size = getattr(task, key)
        if size % group:
            near = max(group, size - size % group)
            yield f"task.{key}={size} does not divide by task.num_generations={group}: give task.{key}={near}"
    yield from overlong_problems(config)
    if given := narrowing_options(config.generation):
        why = "a policy learns from what it samples with all its probabilities"
        yield f"{given}: {why}: remove it, or give generation.temperature"
    if isinstance(task, GRPOConfig) and task.max_ratio is not None:
        high = 1.0 + (task.clip_coeff if task.clip_high is None else task.clip_high)
        if task.max_ratio <= high:
            yield f"task.max_ratio={task.max_ratio:g} is not above the clipped ratio {high:g}: give for example 4"
    if isinstance(task, DistillConfig) and task.teacher is None:
        yield "task.teacher is missing: give the folder or the hub id of the model that is learned from"
    elif isinstance(task, DistillConfig):
        if problem := model_problem(task.teacher, weights=True, key="task.teacher"):
            yield problem
    elif isinstance(config.reward, NoRewardConfig):
        yield f"reward=none gives task={task.config_name} nothing to learn: give for example reward=model"
    compares = f"task={task.config_name} compares probabilities of different passes"
    if model.finetune_mode == "LORA" and model.lora_cfg is not None and model.lora_cfg.dropout > 0:
        yield f"model.lora_cfg.dropout={model.lora_cfg.dropout}: {compares}: give model.lora_cfg.dropout=0"
    if not model.disable_dropout:
        yield f"model.disable_dropout=false: {compares}: give model.disable_dropout=true"
    if isinstance(task, BestOfNConfig):
        yield from _best_of_n_problems(config)
    if isinstance(config.rollout, VLLMRolloutConfig):
        yield from _server_problems(config, config.rollout)
    if isinstance(config.rollout, LocalRolloutConfig):
        yield from environment_problems(config)


def _server_problems(config: TrainConfig, rollout: VLLMRolloutConfig) -> Iterator[str]:
    """Problems of rollout servers, and of options that they do not support."""
    example = "give for example rollout.urls=[http://127.0.0.1:8000]"
    for url in rollout.urls or (None,):
        if problem := url_problem("rollout.urls", url, example):
            yield problem
    if len({url.rstrip("/") for url in rollout.urls}) < len(rollout.urls):
        yield "rollout.urls has an address twice: give each server once"
    model, has_adapter = config.model, config.model.finetune_mode == "LORA"
    if rollout.sync not in (None, *(["adapter"] if has_adapter else ["folder", "nccl"])):
        needed = "adapter" if has_adapter else "folder or nccl"
        yield f"rollout.sync={rollout.sync} does not fit model.finetune_mode={model.finetune_mode}: give {needed}"
    if rollout.max_staleness and not isinstance(config.task, RatioTaskConfig):
        yield unread(f"rollout.max_staleness={rollout.max_staleness}", f"by task={config.task.config_name}")
    if rollout.sync_dir is not None:
        yield from new_folder_problems("rollout.sync_dir", rollout.sync_dir)


def environment_problems(config: TrainConfig | EvalConfig | InspectConfig) -> Iterator[str]:
    """Problems of an environment: its class, its options, and other options that do not go with it."""
    rollout = config.rollout
    if not isinstance(rollout, LocalRolloutConfig):
        yield unread(f"rollout={rollout.config_name}", f"by task={config.task.config_name}")
        return
    source, given = rollout.environment, f"rollout.environment={rollout.environment}"
    if source is None:
        return
    if is_users_own(source):
        yield from _users_own_problems("rollout.environment=", source)
    elif source not in ENVIRONMENTS:
        did = did_you_mean(source, list(ENVIRONMENTS), "it", key="rollout.environment=")
        yield f"{given} is unknown: {did} may be {', '.join(ENVIRONMENTS)}, or a class of yours as package.module:Class"
    if isinstance(config, EvalConfig):
        if not isinstance(config.task, RewardConfig | GenerateConfig | FrontierConfig):
            yield unread(given, f"by task={config.task.config_name}", "task=reward, frontier or generate")
        elif config.task.writes == "text" and config.generation.num_beams > 1:
            yield f"{given} is not supported by generation.num_beams={config.generation.num_beams}: remove one of them"
        return
    if isinstance(config.task, BestOfNConfig):
        yield f"{given}: task=best_of_n writes rows to fine-tune on, which cannot leave out results: remove one of them"
    elif not isinstance(config.task, OnlineTaskConfig):
        yield unread(given, f"by task={config.task.config_name}", "task=grpo, rloo, reinforce_pp, ppo or online_dpo")


def _best_of_n_problems(config: TrainConfig) -> Iterator[str]:
    """Options that a task without training does not use."""
    for group, value, default in (("optim", config.optim, AdamWConfig()), ("task", config.task, BestOfNConfig())):
        names = config.task.unread if group == "task" else vars(default)
        changed = {f"{group}.{name}": getattr(value, name, None) for name in sorted(names)}
        changed = {key: now for key, now in changed.items() if now != getattr(default, key.partition(".")[2])}
        for key, now in changed.items() if type(value) is type(default) else [(group, value.config_name)]:
            yield unread(f"{key}={now}", "by task=best_of_n, which learns nothing")


def overlong_problems(config: TrainConfig | EvalConfig) -> Iterator[str]:
    """A length penalty that begins before the response."""
    most = config.generation.max_new_tokens
    if config.reward.overlong_buffer > most:
        given = f"reward.overlong_buffer={config.reward.overlong_buffer}"
        yield f"{given} is more than generation.max_new_tokens={most}: give at most that"


def model_score_problems(config: TrainConfig | EvalConfig) -> Iterator[str]:
    """A reward model that was given and that the reward does not ask; rewards of steps that nothing can use."""
    each = getattr(config.reward, "step_score", "min") == "each"
    if each and not isinstance(config.task, PPOConfig | ReinforcePPConfig):
        where = f"by task={config.task.config_name}, which has one reward for a response"
        yield unread("reward.step_score=each", where, "reward.step_score=min, product or last")
    run = getattr(config.task, "rm_experiment_dir", None)
    if run is not None and not is_run_alias(run) and not scores_by_run(config):
        yield unread(f"task.rm_experiment_dir={run}", f"by reward={config.reward.config_name}", "reward=model")


def narrowing_options(generation: GenConfig) -> str:
    """The options that keep a sampler from using all probabilities, as they are typed; empty if there are none."""
    usual = (("top_k", 0), ("top_p", 1.0), ("num_beams", 1))
    return ", ".join(f"generation.{name}" for name, off in usual if getattr(generation, name) != off)


def eval_problems(config: EvalConfig) -> Iterator[str]:
    """Problems of an evaluation: missing packages, model or run, weights, or reward."""
    name, writes = config.task.config_name, config.task.writes
    yield from unread_options(config, "generation.engine", *(() if writes else ("generation.stop_strings",)))
    if given := narrowing_options(config.generation) if writes == "samples" else "":
        yield f"{given}: task={name} samples with all probabilities: remove it, or give generation.temperature"
    yield from _reward_problems(config)
    yield from environment_problems(config)
    if config.experiment_dir is None and isinstance(config.task, FrontierConfig):
        yield "task=frontier goes over the checkpoints of a run: give experiment_dir=<run directory>"
    elif config.experiment_dir is None:
        if missing := [name for name in ("model", "data") if getattr(config, name) is None]:
            give = " and ".join(f"{name}=<{', '.join(choices(name))}>" for name in missing)
            yield f"nothing to evaluate: give experiment_dir=<run directory>, or {give}"
        yield from new_folder_problems("output_dir", config.output_dir)
    if isinstance(config.task, FrontierConfig) and config.task.model_name != EvalTaskConfig.model_name:
        yield unread(f"task.model_name={config.task.model_name}", "by task=frontier, which takes all")
    elif not is_weights_name(config.task.model_name):
        yield from weights_problems("", config.task.model_name, key="", name_key="task.model_name")
    elif config.experiment_dir is not None:
        yield from _run_problems(config, config.experiment_dir)


def _reward_problems(config: EvalConfig) -> Iterator[str]:
    """A reward that nothing reads, or that cannot score; a comparison with nothing."""
    task = config.task
    if task.writes != "samples":
        yield from unread_options(config, "reward")
        return
    yield from start_problems(config)
    yield from model_score_problems(config)
    yield from overlong_problems(config)
    if isinstance(task, RewardConfig):
        yield from _against_problems(config, task.against)


def _against_problems(config: EvalConfig, against: str) -> Iterator[str]:
    """Problems of the responses to compare with."""
    if against.casefold() in (REFERENCES, NOTHING):
        return
    if against.casefold() == START:
        if config.experiment_dir is None:
            yield "task.against=start: a model that no run has trained has no start: give references or a run directory"
        elif config.model is not None and config.model.random_init:
            yield f"task.against=start: {config.experiment_dir} began with random weights: give references or a run"
        return
    try:
        trained = task_of_run(read_run_config(against, key="task.against"))
        saved_group(against, "model", key="task.against")
    except ConfigError as error:
        yield from (f"{problem}; it may also be {REFERENCES}, {START} or {NOTHING}" for problem in error.problems)
        return
    if trained is not None and trained.trains != "policy":
        yield f"task.against={against}: this run of task={trained.config_name} trained a {trained.trains}: give another"
        return
    yield from weights_problems(against, "final", key="task.against", name_key="task.model_name")


def _run_problems(config: EvalConfig, run_dir: str) -> Iterator[str]:
    """Problems of the run that is evaluated: missing weights, or a folder that is not writable."""
    yield from new_folder_problems("experiment_dir", str(Path(run_dir) / "eval"))
    yield from link_problems(Path(run_dir), (), ("eval",))
    saved = read_run_config(run_dir)
    trained = task_of_run(saved)
    what, wanted = "policy" if trained is None else trained.trains, config.task.evaluates
    if what not in wanted:
        able = [name for name, cls in choices("task", "eval").items() if what in getattr(cls, "evaluates", ())]
        give = f"task={' or '.join(able)}, or another run" if able else "another run"
        of = "" if trained is None else f" of task={trained.config_name}"
        yield (
            f"experiment_dir={run_dir}: task={config.task.config_name} evaluates a {' or a '.join(wanted)}, and this "
            f"run{of} trained a {what}: give {give}"
        )
        return
    if isinstance(config.task, FrontierConfig):  # it begins at a start, and has points
        if config.model is not None and config.model.random_init:
            yield f"experiment_dir={run_dir}: task=frontier needs a start, and this run began with random weights"
        if not Path(run_dir, "final").is_dir() and not any(Path(run_dir).glob("checkpoints/step-*")):
            again = shell_word("resume_from", str(run_dir))
            yield f"experiment_dir={run_dir}: this run has no checkpoint; continue it by {again}"
    else:
        yield from weights_problems(run_dir, config.task.model_name, key="experiment_dir", name_key="task.model_name")
    task = saved.get("task")
    start = task.get("sft_experiment_dir") if isinstance(task, dict) else None
    adapters = config.model is not None and config.model.finetune_mode == "LORA"
    if isinstance(start, str) and adapters and not Path(start).is_dir():
        yield f"experiment_dir={run_dir} has adapters for the model that {start} left, which is gone: put it back"
