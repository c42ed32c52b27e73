"""The package writes and deletes through `utils/output.py`, save the places listed here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sheeprlhf"
HELPERS = ("utils/output.py",)
DEVELOPERS = "assets/"  # scripts that build what the package ships; no command reaches them
REVIEWED = {
    "cli.py:_guarded:os.open": "the null device",
    "utils/processes.py:write:os.open": "the null device",
    "utils/processes.py:open_closed_streams:fdopen": "the null device",
    "apps/sweep.py:run_sweep:mkdtemp": "a new folder of the system's",
    "apps/sweep.py:run_sweep:rmtree": "that folder",
    "launch.py:launch:TemporaryDirectory": "a new folder of the system's",
    "apps/pipeline.py:check_stages:TemporaryDirectory": "a new folder of the system's",
    "task/eval/rouge.py:__init__:TemporaryDirectory": "a new folder of the system's",
    "apps/fetch.py:fetch_from_hub:snapshot_download": "the hub's own cache",
    "apps/sweep.py:sweep_parent:mkdir": "root_dir itself, which several users may share",
    "data/prepare.py:_build:unlink": "the first pass in a new folder that is filled",
    "data/store.py:__init__:OSFile": "fills a new folder",
    "data/source.py:snapshot:snapshot_download": "the hub's own cache",
    "engine/rundir.py:fill:copyfile": "the scratch folder of `write_folder`",
    "security/model_folder.py:adapter_folder_of:snapshot_download": "the hub's own cache",
    "security/model_folder.py:download_weights:hf_hub_download": "the hub's own cache",
    "security/model_folder.py:folder_of:snapshot_download": "the hub's own cache",
    "model/adapter.py:save_model:save_pretrained": "fills a new folder",
    "security/pickled_weights.py:_convert:save_file": "fills a new folder",
    "agent/policy.py:save:save_model": "fills a new folder",
    "agent/reward.py:save:save_model": "fills a new folder",
    "agent/policy.py:save:save_pretrained": "fills a new folder",
    "agent/reward.py:save:save_pretrained": "fills a new folder",
    "task/export.py:_save:save_pretrained": "fills a new folder",
    "engine/checkpoint.py:create:save_file": "fills a new folder",
    "engine/parts.py:create_tensor_file:truncate": "a file that it has just made",
    "engine/parts.py:write_rows:open": "a file of `create_tensor_file`",
    "engine/parts.py:write_rows:os.open": "a file of `create_tensor_file`",
    "engine/checkpoint.py:_set_aside:rename": "to a name that is free, after a check of the folders above it",
    "engine/manifest.py:write_folder:mkdir": "in a new folder",
    "engine/manifest.py:write_folder:rename": "the new folder to its place",
    "engine/manifest.py:write_folder:rmdir": "an empty folder in its place",
    "engine/manifest.py:remove_folder:rename": "a folder that is ours, into one that is deleted",
    "engine/metrics.py:__init__:unlink": "a file of samples, known by its first line",
    "engine/rundir.py:discard_unused:unlink": "what this process wrote at its start",
    "engine/rundir.py:discard_unused:rmdir": "empty folders",
    "engine/rundir.py:_make_dir:mkdir": "the run directory itself, and folders above it, which several users may share",
    "engine/run.py:check_shared:unlink": "an empty file that it has just made, under a random name",
    "task/train/best_of_n.py:remove:unlink": "the rows of one rollout, after a check of the folders above it",
    "task/train/best_of_n.py:remove:rmdir": "an empty folder",
    "data/source.py:listed_folder:os.open": "a new file in a folder of the data cache",
    "data/source.py:listed_folder:truncate": "this new file",
    "data/source.py:download:hf_hub_download": "checked paths in a folder of the data cache",
    "data/source.py:release:open": "a file of this folder that was downloaded",
    "data/source.py:release:truncate": "this file",
    "data/source.py:release:unlink": "the library's record of its download",
    "rollout/tool_environments.py:run_program:TemporaryDirectory": "a new folder of the system's",
    "rollout/server.py:_save_untied:save_pretrained": "fills a new folder",
    "rollout/server.py:write_weights:save_pretrained": "fills a new folder",
    "rollout/server.py:write:save_file": "fills a new folder",
    "rollout/server.py:finish:rmdir": "an empty folder",
    "task/finish.py:write_rollout:write_table": "into memory",
    "task/eval/result.py:_drawing:savefig": "into memory",
    "apps/inspect.py:draw_histograms:savefig": "into memory",
    "apps/report_page.py:draw_png:savefig": "into memory",
    "apps/report_page.py:_svg:savefig": "into memory",
}
WRITERS = {
    *("write_text", "write_bytes", "touch", "mkdir", "makedirs", "mkfifo", "mknod", "symlink", "symlink_to", "link"),
    *("hardlink_to", "rename", "renames", "unlink", "rmdir", "removedirs", "rmtree", "chmod", "lchmod", "fchmod"),
    *("chown", "truncate", "utime", "copy2", "copyfile", "copytree"),
    *("copymode", "copystat", "move", "make_archive", "unpack_archive", "extractall", "save_file", "save_model"),
    *("save_pretrained", "push_to_hub", "to_csv", "to_parquet", "to_excel", "to_pickle", "to_feather", "to_hdf"),
    *("to_html", "to_markdown", "savefig", "imsave", "SummaryWriter", "FileWriter", "EventFileWriter"),
    *("FileHandler", "RotatingFileHandler", "TimedRotatingFileHandler", "WatchedFileHandler", "basicConfig"),
    *("savez", "savez_compressed", "savetxt", "tofile", "memmap", "NamedTemporaryFile", "TemporaryDirectory"),
    *("mkstemp", "mkdtemp", "mktemp", "save_to_disk", "save_as", "urlretrieve", "snapshot_download", "hf_hub_download"),
    *("write_table", "write_feather", "write_dataset", "ParquetWriter", "OutputStream", "create_memory_map"),
    *("save_state", "save_safetensors", "export_chrome_trace", "write_json"),
}
OF_MODULES = {  # functions whose name alone says too little
    "os": {"remove", "replace"},
    "shutil": {"copy"},
    "sqlite3": {"connect"},
    "torch": {"save"},
    "np": {"save"},
}
OURS = {"run", "trained", "self"}  # their `save` is a function of the package


def modes(call: ast.Call) -> Iterator[str]:
    """Texts among the arguments that can be the mode of `open`."""
    for value in [*call.args, *(word.value for word in call.keywords if word.arg in (None, "mode"))]:
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and not set(value.value) - set("rwaxbt+"):
            yield value.value


def name_of(call: ast.Call) -> str | None:
    """What a call is called in `REVIEWED`, if it may write, delete or rename."""
    function = call.func
    if isinstance(function, ast.Name):
        name, owner = function.id, ""
    elif isinstance(function, ast.Attribute):
        name, owner = function.attr, function.value.id if isinstance(function.value, ast.Name) else ""
    else:
        return None
    if (name == "open" and owner == "os") or name == "open_file":
        flags = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
        return "os.open" if flags & {"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"} else None
    if name in ("open", "fdopen", "ZipFile", "TarFile", "GzipFile", "memory_map", "OSFile"):
        known = list(modes(call))
        place = 1 if isinstance(function, ast.Name) or owner in ("io", "gzip", "lzma", "bz2", "zipfile", "pa") else 0
        variable = len(call.args) > place and not isinstance(call.args[place], ast.Constant)
        variable |= any(word.arg == "mode" and not isinstance(word.value, ast.Constant) for word in call.keywords)
        reads = owner in ("tokenize", "archive")  # their second argument is no mode
        return name if any(set(mode) & set("wax+") for mode in known) or (variable and not reads) else None
    if name == "save" and call.args and owner not in OURS:
        return name if owner not in ("", "np", "torch") or isinstance(function, ast.Attribute) else None
    if name == "dump" and len(call.args) > 1:
        return name
    if name == "replace" and isinstance(function, ast.Attribute) and len(call.args) + len(call.keywords) == 1:
        return name  # of Path: that of texts has two
    return name if name in WRITERS or name in OF_MODULES.get(owner, ()) else None


def writes(source: str, module: str) -> Iterator[tuple[str, int]]:
    """The calls of a module that may write: `module:function:call`, and the line."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and (name := name_of(node)):
            yield f"{module}:{function}:{name}", node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(source), "")


def test_nothing_else_in_the_package_writes() -> None:
    found: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = str(path.relative_to(PACKAGE))
        if module not in HELPERS and not module.startswith(DEVELOPERS):
            found |= dict(writes(path.read_text(encoding="utf-8"), module))
    assert {place: line for place, line in found.items() if place not in REVIEWED} == {}
    assert REVIEWED.keys() - found.keys() == set()  # no exception outlives its reason


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')",
        "open(path, mode=mode)",
        "open(path, 'r+b')",
        "path.open('a', newline='')",
        "path.open(mode='xb')",
        "gzip.open(path, 'wt')",
        "zipfile.ZipFile(path, 'w')",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "path.write_text('')",
        "(folder / name).write_bytes(content)",
        "path.replace(target)",
        "os.replace(path, target)",
        "os.remove(path)",
        "shutil.copy(path, target)",
        "shutil.rmtree(folder)",
        "save_file(tensors, path)",
        "torch.save(state, path)",
        "tokenizer.save(str(path))",
        "np.save(path, array)",
        "json.dump(content, file)",
        "frame.to_csv(path)",
        "figure.savefig(path)",
        "model.save_pretrained(folder)",
        "SummaryWriter(folder)",
        "logging.FileHandler(path)",
        "pa.OSFile(path, 'wb')",
    ],
)
def test_what_counts_as_writing(line: str) -> None:
    assert list(writes(line, "m.py"))


@pytest.mark.parametrize(
    "line", ["open(path)", "path.open('rb')", "text.replace('a', 'b')", "json.dumps(x)", "names.remove(name)"]
)
def test_what_does_not(line: str) -> None:
    assert not list(writes(line, "m.py"))
