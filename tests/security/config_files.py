"""Configuration files that a stranger could send, and the commands that compose them."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sheeprlhf.cli import run
from sheeprlhf.config.pipeline import stages_of
from sheeprlhf.structure.run import PipelineConfig
from sheeprlhf.utils.errors import ConfigError

PRIMARY = (
    "defaults: [train_schema, {task: sft}, {model: tiny}, {data: docstrings}, {fabric: cpu}, {optim: adamw}, "
    "{reward: auto}, _self_]\n"
)
CALL = "{_target_: builtins.open, file: SENTINEL, mode: w}"
MERGE_BOMB = "".join(
    f"  {b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

# Keys of Hydra. MODULE is importable, and makes SENTINEL when it is imported.
OF_HYDRA = {
    "searchpath of a package": "searchpath: ['pkg://MODULE']",
    "searchpath of a module": "searchpath: ['structured://MODULE']",
    "searchpath of a folder": "searchpath: ['file:///tmp']",
    "searchpath by the environment": "searchpath: ['pkg://${oc.env:CANARY}']",
    "launcher": f"launcher: {CALL}",
    "launcher of a plugin": "launcher: {_target_: hydra_plugins.MODULE.Launcher}",
    "sweeper": f"sweeper: {CALL}",
    "callbacks": f"callbacks: {{mine: {CALL}}}",
    "job_logging": "job_logging: {version: 1, handlers: {h: {(): builtins.open, file: SENTINEL, mode: w}}}",
    "job_logging to a file": "job_logging: {handlers: {h: {class: logging.FileHandler, filename: SENTINEL}}}",
    "hydra_logging": "hydra_logging: {version: 1, handlers: {h: {(): builtins.open, file: SENTINEL, mode: w}}}",
    "env_set": "job: {env_set: {LD_PRELOAD: SENTINEL}}",
    "env_copy": "job: {env_copy: [CANARY]}",
    "chdir": "job: {chdir: true}",
    "job name": "job: {name: '${oc.env:CANARY}'}",
    "config of override_dirname": "job: {config: {override_dirname: {kv_sep: /}}}",
    "run.dir": "run: {dir: SENTINEL}",
    "run.dir by the environment": "run: {dir: '${oc.env:CANARY}'}",
    "a second key of run": "run: {dir: ., other: SENTINEL}",
    "sweep.dir": "sweep: {dir: SENTINEL}",
    "sweep.subdir": "sweep: {subdir: ../../SENTINEL}",
    "output_subdir": "output_subdir: SENTINEL",
    "help": "help: {template: '${oc.env:CANARY}'}",
    "hydra_help": "hydra_help: {template: '${oc.env:CANARY}'}",
    "mode": "mode: MULTIRUN",
    "verbose": "verbose: true",
    "runtime": "runtime: {output_dir: SENTINEL}",
}
# Whole primary configurations.
PRIMARIES = {
    "hydra is an interpolation": f"{PRIMARY}hydra: ${{oc.env:CANARY}}\n",
    "hydra is an alias": f"{PRIMARY}run_name: x\nstart: &a {{verbose: true}}\nhydra: *a\n",
    "hydra by a merge key": f"{PRIMARY}x: &a {{hydra: {{verbose: true}}}}\n<<: *a\n",
    "hydra is a list": f"{PRIMARY}hydra: [verbose]\n",
    "hydra is null": f"{PRIMARY}hydra: null\n",
    "hydra twice": f"{PRIMARY}hydra: {{output_subdir: null}}\nhydra: {{verbose: true}}\n",
    "two documents": f"{PRIMARY}---\nhydra: {{verbose: true}}\n",
    "no schema": "run_name: x\nseed: 1\n",
    "schema of another command": PRIMARY.replace("train_schema", "fetch_schema"),
    "defaults of a launcher": PRIMARY.replace("_self_", "_self_, override hydra/launcher: evil"),
    "defaults of callbacks": PRIMARY.replace("_self_", "hydra/callbacks: evil, _self_"),
    "defaults by an absolute name": PRIMARY.replace("_self_", "_self_, override /hydra/sweeper: evil"),
    "defaults with a package": PRIMARY.replace("{model: tiny}", "'model@hydra.launcher': evil"),
    "defaults with the global package": PRIMARY.replace("{model: tiny}", "'model@_global_': evil"),
    "defaults with a package of one name": PRIMARY.replace("_self_", "_self_, evil@hydra"),
    "defaults of a package": PRIMARY.replace("_self_", "_self_, 'pkg://MODULE'"),
    "defaults out of the folder": PRIMARY.replace("_self_", "_self_, ../outside"),
    "defaults of a group out of the folder": PRIMARY.replace("{model: tiny}", "{model: ../../outside}"),
    "defaults by a whole path": PRIMARY.replace("_self_", "_self_, /etc/passwd"),
    "defaults by the environment": PRIMARY.replace("{model: tiny}", "{model: '${oc.env:CANARY}'}"),
    "defaults of another group": PRIMARY.replace("{model: tiny}", "{callbacks: evil}"),
    "defaults are a text": "defaults: hydra/launcher\n",
    "a tag that calls": f"{PRIMARY}run_name: !!python/object/apply:os.mkdir [SENTINEL]\n",
    "a tag that makes a path": f"{PRIMARY}run_name: !!python/object/apply:pathlib.Path [SENTINEL]\n",
    "a tag of bytes": f"{PRIMARY}run_name: !!binary aGVsbG8=\n",
    "a key that is a number": f"{PRIMARY}1: x\n",
    "a key of null": f"{PRIMARY}null: x\n",
    "a key that is a list": f"{PRIMARY}? [a, b]\n: x\n",
    "a list": "[1, 2]\n",
    "a text": "x\n",
    "cut off": f"{PRIMARY}task: {{epochs: [1\n",
    "letters of another encoding": "\udcff\udcfe",
    "a byte of zero": f"{PRIMARY}run_name: \0\n",
    "merge keys without end": f"{PRIMARY}x:\n  a: &a {{x: 1}}\n{MERGE_BOMB}",
    "part of itself": f"{PRIMARY}x: &a {{b: *a}}\n",
}
# What only a recipe's or a group's file can do.
HEADERS = {
    "package of hydra": "# @package hydra\nverbose: true\n",
    "package of a launcher": "# @package hydra.job\nchdir: true\n",
    "package without a space": "#@package hydra\nverbose: true\n",
    "package below the global one": "# @package _global_.hydra\nverbose: true\n",
    "package of the group and more": "# @package _group_.hydra\nverbose: true\n",
    "package after another header": "# @x y\n# @package hydra\nverbose: true\n",
    "package of another option": "# @package task\nx: 1\n",
}
VALUES = {
    "an interpolation of the environment": "run_name: ${oc.env:CANARY}\n",
    "an interpolation inside of another": "run_name: ${data.${oc.env:CANARY}}\n",
    "an interpolation in a list": "optim: {betas: ['${oc.env:CANARY}', 0.9]}\n",
    "an interpolation in a key": "'${oc.env:CANARY}': x\n",
    "an interpolation of Hydra": "run_name: ${hydra:runtime.cwd}\n",
    "an interpolation of Hydra's part": "run_name: ${hydra.job.name}\n",
    "an unknown resolver": "run_name: '${eval:1+1}'\n",
    "interpolations without end": "run_name: '${root_dir}${root_dir}'\nroot_dir: '${run_name}${run_name}'\n",
    "a target": f"task: {CALL}\n",
    "a target in a list": f"optim: {{betas: [{CALL}]}}\n",
    "a partial target": "task: {_partial_: true, _args_: [SENTINEL], _convert_: all}\n",
    "remote code": "model: {library_cfg: {trust_remote_code: true, revision: '" + "0" * 40 + "'}}\n",
    "a function": "reward: {path: 'MODULE:f'}\n",
    "an entry point": "task: {entry_point: 'os:mkdir'}\n",
}
# Words of a stage, with which a recipe for `pipeline` could speak as the command line does.
STAGES = {
    "searchpath": "hydra.searchpath=[pkg://MODULE]",
    "searchpath by force": "++hydra.searchpath=[pkg://MODULE]",
    "a launcher": "+hydra/launcher=evil",
    "a package": "model@hydra.launcher=evil",
    "a flag": "--config-dir=/tmp",
    "a pickle": "--experimental-rerun=SENTINEL",
    "remote code": "model.library_cfg.trust_remote_code=true",
    "remote code in a dictionary": "model.library_cfg={trust_remote_code:true}",
    "remote code in a larger dictionary": "model={library_cfg:{trust_remote_code:true}}",
    "a function": "reward=function reward.path=MODULE:f",
    "a function in quotes": "reward=function \"reward.path='MODULE:f'\"",
    "a function in a list": "reward=list 'reward.terms=[2*length,MODULE:f]'",
    "a function in a dictionary": "reward={path:MODULE:f}",
    "functions of a sweep": "-m reward=function reward.path=exact_match,MODULE:f",
    "the environment": "'run_name=${oc.env:CANARY}'",
}


class Shared(NamedTuple):
    """Files by their paths below `--config-dir`, and the command that composes them."""

    files: dict[str, str]
    words: list[str]


def shared() -> Iterator[tuple[str, Shared]]:
    """Every example, with a name; what needs a recipe's file is shared as one, the rest as a primary configuration."""
    whole, recipe = ["--config-name=mine"], ["task=sft", "experiment=mine"]
    for name, text in OF_HYDRA.items():
        yield f"hydra.{name}", Shared({"mine.yaml": f"{PRIMARY}hydra: {{{text}}}\n"}, whole)
    for name in ("searchpath of a package", "callbacks", "run.dir"):
        text = f"# @package _global_\nhydra: {{{OF_HYDRA[name]}}}\n"
        yield f"hydra.{name} in a recipe", Shared({"experiment/mine.yaml": text}, recipe)
    for name, text in PRIMARIES.items():
        yield name, Shared({"mine.yaml": text} | _EVIL, whole)
    for name, text in HEADERS.items():
        yield name, Shared({"model/mine.yaml": text}, ["task=sft", "model=mine"])
    for name, text in VALUES.items():
        yield name, Shared({"mine.yaml": f"{PRIMARY}{text}"}, whole)
    yield "a package of hydra in a recipe", Shared({"experiment/mine.yaml": HEADERS["package of hydra"]}, recipe)
    text = f"# @package _global_\n{VALUES['an interpolation of the environment']}"
    yield "an interpolation in a sweep", Shared({"experiment/mine.yaml": text}, ["-m", "seed=1,2", *recipe])
    stages = f"# @package _global_\ncommon:\n  train: >-\n    {STAGES['searchpath']}\nstages:\n  a: train task=sft\n"
    yield "words of all stages", Shared({"experiment/mine.yaml": stages}, ["pipeline", "experiment=mine"])
    yield "a launcher that is chosen by name", Shared(_EVIL, ["task=sft", "hydra/launcher=evil"])
    yield "a folder of Hydra's environment", Shared({"hydra/env/x.yaml": "x: 1\n"}, ["task=sft", "hydra/env=x"])
    searchpath = {"mine.yaml": f"{PRIMARY}hydra: {{{OF_HYDRA['searchpath of a package']}}}\n"}
    for flag in ("--info=config", "--info=defaults", "--info=all", "--cfg=job", "--cfg=hydra", "-m"):
        yield f"searchpath with {flag}", Shared(searchpath, [*whole, flag])


# what the files above could bring in
_EVIL = {
    "hydra/launcher/evil.yaml": "n_jobs: 1\n",
    "hydra/sweeper/evil.yaml": "max_batch_size: 1\n",
    "hydra/callbacks/evil.yaml": "mine: {path: x}\n",
    "model/evil.yaml": "defaults: [tiny]\nhydra: {verbose: true}\n",
    "callbacks/evil.yaml": "# @package hydra.callbacks\nmine: {path: x}\n",
    "evil.yaml": "verbose: true\n",
}


def attempts(place: Path, sentinels: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every example as files, and what runs its command.

    Args:
        place: an empty folder.
        sentinels: where payloads make files.
    """
    (place / "outside.yaml").write_text("hydra: {verbose: true}\n")
    for number, (name, example) in enumerate(shared()):
        folder, module = place / f"{number}", f"payload_of_config_{number}"
        for path, text in example.files.items():
            (folder / "theirs" / path).parent.mkdir(parents=True, exist_ok=True)
            text = text.replace("SENTINEL", str(sentinels / f"{number}")).replace("MODULE", module)
            (folder / "theirs" / path).write_bytes(text.encode(errors="surrogateescape"))
        (folder / "importable" / module).mkdir(parents=True)
        payload = f"open({str(sentinels / module)!r}, 'w')\n"
        (folder / "importable" / module / "__init__.py").write_text(payload)
        yield name, lambda folder=folder, words=example.words: _run(folder, words)
    for name, text in STAGES.items():
        recipe = PipelineConfig(stages={"a": f"train task=sft {text}"})
        yield f"a stage with {name}", lambda recipe=recipe: stages_of(recipe)
    yield from _links(place)


def _links(place: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Files that are none, or lie elsewhere."""
    secret = place / "secret.txt"
    secret.write_text("canary: of a file elsewhere\n")
    for name in ("link", "folder", "pipe"):
        theirs = place / name / "theirs"
        theirs.mkdir(parents=True)
        (place / name / "importable").mkdir()
        if name == "link":
            (theirs / "mine.yaml").symlink_to(secret)
        elif name == "pipe":
            os.mkfifo(theirs / "mine.yaml")
        else:
            (place / "elsewhere").mkdir()
            (place / "elsewhere" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
            (theirs / "experiment").symlink_to(place / "elsewhere")
    yield "a link to another file", lambda: _run(place / "link", ["--config-name=mine"])
    yield "a pipe", lambda: _run(place / "pipe", ["--config-name=mine"])
    yield "a link to another folder", lambda: _run(place / "folder", ["task=sft", "experiment=mine"])


def _run(folder: Path, words: list[str]) -> None:
    """Run one command.

    Raises:
        ConfigError: it was refused with exit code 2 and a message of ours.
    """
    verb = ["pipeline"] if words[0] == "pipeline" else ["train"]
    arguments = [*verb, f"--config-dir={folder / 'theirs'}", *(word for word in words if word != "pipeline")]
    printed = io.StringIO()
    sys.path.insert(0, str(folder / "importable"))
    os.environ["CANARY"] = "canary-of-the-environment"
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            run(arguments)
    except SystemExit as stop:
        text = printed.getvalue()
        if stop.code != 2 or "cannot continue:" not in text or "Traceback" in text or "canary" in text:
            raise AssertionError(text[-2000:]) from stop
        raise ConfigError("refused with exit code 2") from stop
    finally:
        sys.path.remove(str(folder / "importable"))
        del os.environ["CANARY"]


TARGETS = """
distutils.spawn.spawn os.system os.popen os.mkdir os.makedirs os.open os.mkfifo os.mknod os.symlink os.link
os.rename os.remove os.removedirs os.execv os.posix_spawn os.spawnl os.putenv os.chmod posix.system posix.mkdir
nt.system subprocess.run subprocess.Popen subprocess.call subprocess.check_call subprocess.check_output
subprocess.getoutput builtins.open builtins.eval builtins.exec builtins.compile builtins.__import__
builtins.breakpoint io.open io.FileIO pathlib.Path.write_text pathlib.Path.touch pathlib.Path.mkdir
pathlib.Path.unlink pathlib.Path.symlink_to shutil.copyfile shutil.rmtree shutil.move shutil.copytree
shutil.make_archive shutil.unpack_archive tempfile.mkstemp tempfile.mkdtemp site.addsitedir site.main
runpy.run_path runpy.run_module code.interact importlib.import_module importlib.reload pickle.load pickle.loads
marshal.loads shelve.open dbm.open sqlite3.connect logging.FileHandler logging.config.dictConfig logging.os.system
ctypes.CDLL webbrowser.open pty.spawn cProfile.run urllib.request.urlretrieve urllib.request.urlopen
socket.create_connection asyncio.run multiprocessing.Process torch.load torch.hub.load
transformers.AutoModel.from_pretrained hydra.utils.instantiate
""".split()
