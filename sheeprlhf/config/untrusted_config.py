"""Check every YAML file before Hydra reads a key of it, and the composed configuration before a value is resolved."""

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from sheeprlhf.config.overrides import quote_texts
from sheeprlhf.config.registry import BASES, rename_keys
from sheeprlhf.structure.reward import is_users_own
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.output import read_small, real_file

_FUNCTIONS = ("reward.path", "reward.terms", "rollout.environment")
_RECEIVERS = ("reward.url", "reward.api_key_variable", "rollout.urls")  # of texts, of a key and of prompts
_TRUST = "model.library_cfg.trust_remote_code"
_RESOLVER = re.compile(r"\$\{\s*(?!now\b)[\w.]+\s*:")


def content_problems(base: DictConfig, parsed: list[Override]) -> list[str]:
    """Forbidden content of configuration files: model code, user functions, or values from the environment."""
    problems = []
    given = {override.key_or_group for override in parsed}
    if OmegaConf.select(base, "words", default=None) and "words" not in given:
        problems.append("words is set by a file: only the command line may; a recipe has stages and common")
    for key, value in _leaves(OmegaConf.to_container(base, resolve=False), ""):
        if key not in given and value is not None and (problem := _leaf_problem(key, value)):
            problems.append(problem)
        if isinstance(value, str) and _RESOLVER.search(value):
            problems.append(f"{key}={value} asks for something outside the configuration: write the value instead")
    return problems


def _leaf_problem(key: str, value: Any) -> str | None:
    """The reason that a file may not set an option to a value; None if it may."""
    if key in _RECEIVERS or (key == _TRUST and value):
        return f"{key}={value} is set by a file: only the command line may; give it there"
    if key in _FUNCTIONS and is_users_own(str(value).rpartition("*")[2]):
        return f"{key} names the function {value} in a file: only the command line may; give it there"
    return None


def word_problem(word: str) -> str | None:
    """Return what a file that writes this word of a command line may not say, as for options; None if it may."""
    if word.startswith("-"):
        allowed = word in ("-m", "--multirun")
        return None if allowed else f"{word} is a flag in a file: only the command line may give it"
    try:
        override = OverridesParser.create().parse_override(quote_texts(word))
        key, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            value = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else str(value)
    except (HydraException, ValueError):
        return None  # reported when its stage is checked
    if re.split(r"[./@]", key)[0] == "hydra" or override.package is not None:
        return f"{key} is set by a file: only the command line may set it"
    for inner, leaf in _leaves(value, key):
        if problem := _leaf_problem(inner, leaf):
            return problem
        if "${" in str(leaf):
            return f"{inner} has an interpolation in a file: write the value instead"
    return None


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, prefix)
    else:
        yield prefix, node


_MAX_BYTES = 200_000
_MAX_ENTRIES = 100_000  # with aliases written out, as Hydra does: a short file can describe a billion
_PlainLoader = get_yaml_loader()
_HEADER_LETTERS = 512  # in which Hydra looks for a package
_PACKAGES = (None, "_global_", "_group_")
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_GROUP = re.compile(r"(override +|optional +)*/?(?P<group>\w+)")
_GROUPS = {*BASES, "experiment"}
# what our own files say of Hydra, and no file may say more
_OF_HYDRA = {"output_subdir": None, "run": {"dir": "."}}
_QUIET = ({"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"})
_HYDRA_PACKAGE = "hydra.conf"  # Hydra's own files
_ONLY_COMMAND_LINE = "only the command line may set it; remove it from the file"


def check_sources() -> None:
    """Make Hydra read files through the checks of this module, whatever asks for them."""
    Plugins.instance()  # registers Hydra's own sources
    for source in (CheckedFolder, CheckedPackage):
        SourcesRegistry.instance().types[source.scheme()] = source


class CheckedFolder(FileConfigSource):
    """The YAML files of a folder, each checked when it is loaded."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Load one file. Raises ConfigError if it is no plain file of this folder, or has what it may not."""
        return _checked(self, str(self._file(config_path)), config_path, self.text(config_path))

    def text(self, config_path: str) -> str:
        """The text of one file. Raises ConfigError if it is no plain file of this folder."""
        path = self._file(config_path)
        try:
            return read_small(real_file(path, Path(self.path)), _MAX_BYTES).decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a configuration: {error}") from error

    def _file(self, config_path: str) -> Path:
        return Path(self.path, self._normalize_file_name(config_path))


class CheckedPackage(ImportlibResourcesConfigSource):
    """The YAML files of a package, which only the command line can name; those of Hydra itself are not checked."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Load one file. Raises ConfigError if it says what a configuration file may not say."""
        if self.path == _HYDRA_PACKAGE:
            return super().load_config(config_path)
        file = self._normalize_file_name(config_path)
        text = resources.files(self.path).joinpath(file).read_text(encoding="utf-8")
        return _checked(self, f"{self.full_path()}/{file}", config_path, text)


# Workers of Hydra's launchers unpickle these, and register Hydra's own again, which gives way to a class of its name.
CheckedFolder.__name__ = FileConfigSource.__name__
CheckedPackage.__name__ = ImportlibResourcesConfigSource.__name__


def _checked(source: ConfigSource, name: str, config_path: str, text: str) -> ConfigResult:
    """Parse a file and return it as Hydra wants it. Raises ConfigError with every problem of the file."""
    try:
        header = source._get_header_dict(text[:_HEADER_LETTERS])
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        problems = list(_node_problems(node)) or list(_header_problems(config_path, header))
        tree = {} if node is None or problems else loader.construct_document(node)
        problems = problems or list(_tree_problems(tree))
        problems = problems or rename_keys(tree, _group_of(config_path), deprecate=True)
        config = OmegaConf.create({} if problems else tree)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:4])
        raise ConfigError(f"{name} cannot be read as a configuration: {reason}") from error
    if problems:
        raise ConfigError(*dict.fromkeys(f"{name}: {problem}" for problem in problems))
    return ConfigResult(provider=source.provider, path=source.full_path(), config=config, header=header)


def _group_of(config_path: str) -> str:
    """The group of options that a file is a choice of; empty for a whole configuration, such as a recipe."""
    folder = config_path.strip("./").rpartition("/")[0]
    return folder if folder in BASES else ""


def _node_problems(root: yaml.Node | None) -> Iterator[str]:
    """Problems of values that are not plain, refer to something outside of the file, or are too large."""
    waiting, count = [] if root is None else [root], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > _MAX_ENTRIES:
            yield f"it has more than {_MAX_ENTRIES} entries with its aliases written out: write a smaller file"
            return
        line = f"line {node.start_mark.line + 1}"
        if node.tag not in _TAGS:
            yield f"{line} has the tag {node.tag.rpartition(':')[2][:40]!r}: write a plain value without tags and <<"
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield from _key_problems(key)
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        elif "${" in node.value:
            yield f"{line} has an interpolation, which could read the environment: write the value instead of ${{...}}"


def _key_problems(key: yaml.Node) -> Iterator[str]:
    line = f"line {key.start_mark.line + 1}"
    if key.tag != "tag:yaml.org,2002:str":
        yield f"{line} has a key that is not text: put it in quotes, or remove it"
    elif "${" in key.value or (key.value.startswith("_") and key.value.endswith("_")):
        yield f"{line} has the key {key.value[:40]!r}, which could call something: {_ONLY_COMMAND_LINE}"


def _header_problems(config_path: str, header: dict[str, str | None]) -> Iterator[str]:
    """Problem of a file that would become a part of Hydra's own configuration."""
    if config_path.strip("./").split("/")[0] == "hydra":
        yield "the folder hydra/ is of Hydra only, and what it sets could run code: remove it"
    for key, value in header.items():
        if key != "package" or value not in _PACKAGES:
            yield f"# @{key} {value} is not possible: write # @package _global_, or nothing in a group's file"


def _tree_problems(tree: Any) -> Iterator[str]:
    """Keys that only the command line may set, and defaults that are not our groups."""
    if not isinstance(tree, dict):
        yield "it has no keys: write option: value"
        return
    hydra = tree.get("hydra", {})
    if not isinstance(hydra, dict):
        yield f"hydra is not a list of options: {_ONLY_COMMAND_LINE}"
    else:
        for key, value in hydra.items():
            if key not in _OF_HYDRA or value != _OF_HYDRA[key]:
                yield f"hydra.{key[:40]} could run code, read, or write somewhere: {_ONLY_COMMAND_LINE}"
    defaults = tree.get("defaults", [])
    for item in defaults if isinstance(defaults, list) else [defaults]:
        if not _is_default(item):
            yield (
                f"defaults has {str(item)[:80]!r}: give the name of a file of the same folder, or <group>: <name> with "
                f"one of {', '.join(sorted(_GROUPS))}"
            )


def _is_default(item: Any) -> bool:
    """Check that an entry of a defaults list names a choice of our groups, and does not place it elsewhere."""
    if isinstance(item, str):
        return _NAME.fullmatch(item) is not None and ".." not in item and item.split("/")[0] != "hydra"
    if not isinstance(item, dict) or len(item) != 1:
        return False
    if item in _QUIET:
        return True
    ((key, value),) = item.items()
    group = _GROUP.fullmatch(key)
    names = value if isinstance(value, list) else [value]
    return (
        group is not None
        and group["group"] in _GROUPS
        and all(name in (None, "???") or (isinstance(name, str) and _is_default(name)) for name in names)
    )
