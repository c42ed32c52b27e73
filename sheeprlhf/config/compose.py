"""Compose a configuration with Hydra's compose API and say everything that is wrong with it, before Hydra runs."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sheeprlhf.config.command_words import option_word
from sheeprlhf.config.option_checks import option_problems
from sheeprlhf.config.overrides import (
    Chosen,
    condensed,
    key_problem,
    missing_problem,
    pick_groups,
    readable,
    recipe_owner,
)
from sheeprlhf.config.path_checks import new_folder_problems, with_absolute_paths
from sheeprlhf.config.registry import (
    BASES,
    ROOTS,
    choices,
    configs_directory,
    groups,
    leaves,
    options,
    to_typed,
    typed_with_missing,
)
from sheeprlhf.config.run_lookup import (
    RUN_OPTIONS,
    evaluated_run,
    is_newest,
    newest_unfinished,
    read_run_config,
    resolve_runs,
    root_of,
    saved_group,
)
from sheeprlhf.config.untrusted_config import check_sources, content_problems
from sheeprlhf.config.validate import validate
from sheeprlhf.structure.option import Config
from sheeprlhf.structure.run import EvalConfig, RootConfig, TrainConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import known_home
from sheeprlhf.utils.launchers import is_one_of_several, launched

SAVED_CHOICE = "of_the_run"
_WITH_RECIPES = ("train", "doctor", "pipeline")  # commands with the group `experiment`, which has no dataclass


class Source(NamedTuple):
    """Sources of a configuration: the command, the folder of `--config-dir`, and the file of `--config-name`."""

    verb: str
    extra: str | None = None
    config_name: str | None = None

    def name(self) -> str:
        """The file that is composed, by default the command's own."""
        return self.config_name or self.verb


class Job(NamedTuple):
    """One valid job."""

    config: RootConfig  # typed and read-only
    given_dir: str | None  # the directory of `hydra.run.dir=...`, if the user gave one
    runs: dict[str, Any]  # the earlier runs as they were asked for, by option: a directory, `newest` or `auto`


def check(source: Source, overrides: list[str], *, multirun: bool = False, complete: bool = True) -> list[str]:
    """Every problem of a command line, of every job of a sweep; not of missing values unless `complete`."""
    return compose_jobs(source, overrides, multirun=multirun, complete=complete)[1]


def compose_job(source: Source, overrides: list[str]) -> Job:
    """Compose the command line of one job. Raises ConfigError with every problem."""
    jobs, problems = compose_jobs(source, overrides)
    if problems:
        raise ConfigError(*problems)
    return jobs[0]


def compose_jobs(
    source: Source, overrides: list[str], *, multirun: bool = False, complete: bool = True
) -> tuple[list[Job], list[str]]:
    """The valid jobs of a command line, several if it is a sweep, and the problems that `check` returns."""
    parsed, problems = readable(overrides)
    problems += _sweep_problems(parsed) if multirun else []
    jobs = []
    with _hydra(source):
        for words in _jobs(parsed) if multirun else [parsed]:
            try:
                job = _compose_job(source, words, complete)
                jobs += [] if job is None else [job]
            except ConfigError as error:
                problems += error.problems
    return jobs, list(dict.fromkeys(problems))


def compose_for_help(source: Source, overrides: list[str]) -> tuple[Config, dict[str, list[str]]]:
    """The configuration of the groups chosen so far (`task` may stay missing), and the choices of every group."""
    parsed, problems = readable(overrides)
    with _hydra(source):
        chosen = pick_groups(parsed, _group_options(source.verb))
        config = _compose_base(source, chosen, _words(chosen.groups))
    if problems or chosen.problems:
        raise ConfigError(*problems, *chosen.problems)
    with open_dict(config):
        del config["hydra"]
    return typed_with_missing(config), chosen.available


def saved_overrides(verb: str, parsed: list[Override]) -> list[str]:
    """For `eval experiment_dir=<run>`: register the run's model and data as choices, and choose those not given.

    So `data.max_length=64` changes the run's data, and `data=local` replaces it. A sweep over experiment_dir is left
    to `finish`. `train resume_from=<run>` without a task takes all of the run's options.
    """
    given = {override.key_or_group: override for override in parsed}
    resumed = given.get("resume_from")
    if verb == "train" and resumed is not None and not {"task", "experiment"} & given.keys():
        return [] if resumed.is_sweep_override() or resumed.value() is None else _of_resumed(resumed.value(), given)
    folder = given.get("experiment_dir")
    if verb != "eval" or folder is None or folder.is_sweep_override() or folder.value() is None:
        return []
    values = {key: str(given[key].value()) for key in ("root_dir", "task") if key in given}
    of_run = str(folder.value())
    run_dir = evaluated_run(of_run, values.get("root_dir", EvalConfig.root_dir), values.get("task", ""))
    added = [group for group in ("model", "data") if group not in given]
    for group in added:
        ConfigStore.instance().store(group=group, name=SAVED_CHOICE, node=saved_group(run_dir, group))
    found = [] if run_dir == of_run else [option_word("experiment_dir", run_dir)]
    return [*found, *(f"{group}={SAVED_CHOICE}" for group in added)]


def _of_resumed(run_dir: Any, given: Mapping[str, Override]) -> list[str]:
    """The options of a run that continues, except those that are given: its groups, and words of the others."""
    root = str(given["root_dir"].value()) if "root_dir" in given else TrainConfig.root_dir
    found = newest_unfinished(root) if is_newest(run_dir) else str(known_home("resume_from", str(run_dir)))
    saved = read_run_config(found, key="resume_from")
    words = [option_word("resume_from", found)]
    for group in groups("train"):
        if isinstance(saved.get(group), dict) and group not in given:
            node: Any = saved_group(found, group, key="resume_from")
            if group == "fabric" and (launched() is not None or is_one_of_several()):
                node = dataclasses.replace(node, devices=None, num_nodes=None)  # the launcher's, unless given
            ConfigStore.instance().store(group=group, name=SAVED_CHOICE, node=node)
            words.append(f"{group}={SAVED_CHOICE}")
    known = {option.key for option in options(TrainConfig())}
    left_out = {"experiment", "resume", "resume_from", "debug", "root_dir", *given}
    for key, value in leaves({name: value for name, value in saved.items() if name not in groups("train")}):
        if key in known and key not in left_out:
            words.append(option_word(key, value))
    root_of_run = root_of(Path(found).absolute())
    if root_of_run is not None and "root_dir" not in given:  # a longer run is made next to its beginning
        words.append(option_word("root_dir", str(root_of_run)))
    return words


def finish(config: DictConfig, given_dir: str | None = None) -> Job:
    """Make a composed configuration typed, find its runs, and validate it. Raises ConfigError with every problem."""
    runs = {key: OmegaConf.select(config, key) for key in RUN_OPTIONS}
    if OmegaConf.get_type(config) is EvalConfig and config.experiment_dir is not None:
        task = str(OmegaConf.select(config, "task.config_name"))
        config.experiment_dir = evaluated_run(config.experiment_dir, config.root_dir, task)
        for group in ("model", "data"):
            if config[group] is None:
                config[group] = saved_group(config.experiment_dir, group)
    typed = resolve_runs(with_absolute_paths(to_typed(config)), given_dir)
    if problems := validate(typed):
        raise ConfigError(*problems)
    return Job(typed, given_dir, runs)


class _LoadedOnDemand:
    """A dataclass in Hydra's store: Hydra copies what it loads, and the copy of this is the dataclass's configuration.

    A command loads about ten of sixty dataclasses, and each configuration takes milliseconds.
    """

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def __deepcopy__(self, memo: dict[int, Any]) -> DictConfig:
        return cast(DictConfig, OmegaConf.structured(self._cls))


def register_configs() -> None:
    """Everything into Hydra's ConfigStore: the roots as `<verb>_schema`, and the choices of every group."""
    store = ConfigStore.instance()
    setattr(ConfigStore, "__deepcopy__", lambda store, memo: store)  # noqa: B010  # for each composition Hydra copies all
    for verb, root in ROOTS.items():
        _store(store.repo, None, f"{verb}_schema", root)
    for group in BASES:
        for name, cls in choices(group).items():
            _store(store.repo.setdefault(group, {}), group, name, cls)


def _store(folder: dict[str, Any], group: str | None, name: str, cls: type) -> None:
    """Put a dataclass where `ConfigStore.store` puts the whole configuration of one."""
    file, node = f"{name}.yaml", cast(Any, _LoadedOnDemand(cls))
    folder[file] = ConfigNode(file, node, group, package=None, provider=None)


@contextlib.contextmanager
def _hydra(source: Source) -> Iterator[None]:
    """Hydra's compose API over our configurations, the user's folder and the dataclasses, as `--config-dir` does it."""
    register_configs()
    check_sources()
    path = create_config_search_path(str(configs_directory()))
    if source.extra is not None:
        folder = f"file://{Path(source.extra).absolute()}"
        path.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(task_name="sheeprlhf", config_search_path=path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None


def _group_options(verb: str, *, only_own_recipes: bool = True) -> dict[str, list[str]]:
    """The choices of every group, classes and files, without those of other verbs."""
    loader: Any = GlobalHydra.instance().config_loader()
    files = loader.repository  # the loader's own method copies all of it for every group
    found = {}
    for group in groups(verb):
        hidden = {SAVED_CHOICE, *choices(group)} - set(choices(group, verb))
        found[group] = [name for name in files.get_group_options(group, ObjectType.CONFIG) if name not in hidden]
    if verb in _WITH_RECIPES:
        recipes = files.get_group_options("experiment", ObjectType.CONFIG)
        owner = "pipeline" if verb == "pipeline" else "train"  # also of those of `doctor`
        found["experiment"] = [name for name in recipes if not only_own_recipes or recipe_owner(name) in (None, owner)]
    return found


def _words(overrides: list[Override]) -> list[str]:
    return [override.input_line or "" for override in overrides]


def _sweep_problems(parsed: list[Override]) -> list[str]:
    """Hydra composes a sweep once without what is swept, and an option of a task needs one that is chosen then."""
    swept = [override for override in parsed if override.is_sweep_override() and override.key_or_group == "task"]
    inner = [override.key_or_group for override in parsed if override.key_or_group.startswith("task.")]
    if not swept or not inner:
        return []
    return [f"{swept[0].input_line} in a sweep does not go with {inner[0]}: give each task a command of its own"]


def _jobs(parsed: list[Override]) -> Iterator[list[Override]]:
    """The jobs of a sweep; an override whose values only a sweeper knows is left out."""
    parser = OverridesParser.create()
    values = []
    for override in parsed:
        if not override.is_sweep_override():
            values.append([override])
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            values.append([parser.parse_override(f"{key}={value}") for value in override.sweep_string_iterator()])
    yield from map(list, itertools.product(*values))


def _compose_job(source: Source, parsed: list[Override], complete: bool) -> Job | None:
    """The job of these overrides; None unless it has to be complete. Raises ConfigError with every problem."""
    has_recipe = any(override.key_or_group == "experiment" for override in parsed)
    chosen = pick_groups(parsed, _group_options(source.verb, only_own_recipes=has_recipe))
    problems, job = chosen.problems, None
    try:
        saved = saved_overrides(source.verb, parsed)
        base = _compose_base(source, chosen, _words(chosen.groups) + saved)
        hydra = base.hydra
        with open_dict(base):
            del base["hydra"]
            if "experiment" in base:
                base.experiment = hydra.runtime.choices.get("experiment")
        if outside := content_problems(base, parsed):  # before any value is read, and with it what it refers to
            raise ConfigError(*outside)
        missing = [group for group in groups(source.verb) if OmegaConf.is_missing(hydra.runtime.choices, group)]
        problems += _fill_missing_groups(base, missing, source.verb, chosen)
        settled = {word.partition("=")[0] for word in saved}
        given = [override for override in chosen.values if override.key_or_group not in settled]
        found = [key_problem(source.verb, override, base, chosen) for override in given]
        problems += [problem for problem in found if problem]
        if outside := content_problems(base, parsed):
            raise ConfigError(*outside)
        given_dir = _given_dir(base, hydra) if complete else None
        if given_dir is not None:
            problems += new_folder_problems("hydra.run.dir", given_dir, expands=False)
        if complete and (keys := sorted(OmegaConf.missing_keys(base))):
            problems += [missing_problem(key, base) for key in keys if key.split(".")[0] not in chosen.failed]
            problems += [problem for option in options(typed_with_missing(base)) for problem in option_problems(option)]
        elif complete:
            job = finish(base, given_dir)
    except OmegaConfBaseException as error:
        problems.append(condensed(str(error).splitlines(), source.verb))
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return job


def _given_dir(base: DictConfig, hydra: DictConfig) -> str | None:
    """The directory of `hydra.run.dir=...`; None if the user gave none."""
    if OmegaConf.to_container(hydra.run, resolve=False) == {"dir": "."}:
        return None
    with open_dict(base):
        base.hydra = hydra
        HydraConfig.instance().set_config(base)  # for ${hydra:...}
        given = str(base.hydra.run.dir)
        del base["hydra"]
    return None if given == "." else given


def _compose_base(source: Source, chosen: Chosen, words: list[str]) -> DictConfig:
    """The configuration of the chosen groups, in which others may be missing. Raises ConfigError."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    try:  # as for a sweep, whose jobs choose the missing groups
        base = hydra.compose_config(source.name(), [*words, *_words(chosen.hydra)], RunMode.MULTIRUN, from_shell=False)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(condensed(lines, source.verb)) from error
    if OmegaConf.get_type(base) is not ROOTS[source.verb]:  # nothing would check its keys
        advice = f"begin its defaults with - {source.verb}_schema, as configs/{source.verb}.yaml does"
        raise ConfigError(f"--config-name={source.name()} has no options of `{source.verb}`: {advice}")
    return base


def _fill_missing_groups(base: DictConfig, missing: list[str], verb: str, chosen: Chosen) -> Iterator[str]:
    """Yield a problem for each group without a choice, and choose its first, so that all options can be checked."""
    for group in missing:
        if not {group, "experiment"} & chosen.failed:  # a recipe may choose the group
            yield f"{group} is missing: give {group}=<name>; it may be {', '.join(chosen.available[group])}"
        base[group] = OmegaConf.structured(next(iter(choices(group, verb).values())))
