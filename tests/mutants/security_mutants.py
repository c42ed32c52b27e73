"""Mistakes in the reading of strangers' files that their tests notice."""

from tests.mutants.mutant import Mutant

_CORPUS = "tests/security/test_corpus.py::test_every_file_of_the_corpus_is_refused_and_runs_nothing"
_FOLDERS = f"{_CORPUS}[spoilt model folders]"
_LEGITIMATE = "tests/security/test_legitimate.py::test_"

MUTANTS = [
    Mutant(
        trap="strangers: links lead out of the folder",
        file="sheeprlhf/utils/files.py",
        old="    if not any(real.is_relative_to(place) for place in homes):\n",
        new="    if False:\n",
        tests=_FOLDERS,
    ),
    Mutant(  # no snapshot of the hub would load
        trap="strangers: links lead out of the folder",
        file="sheeprlhf/utils/files.py",
        old='if home.parent.name == "snapshots" else [home]',
        new='if home.parent.name == "snapshot" else [home]',
        tests=f"{_LEGITIMATE}a_snapshot_in_the_hubs_cache",
    ),
    Mutant(
        trap="strangers: a header declares what is not there",
        file="sheeprlhf/utils/header.py",
        old="    if 8 + length + end != size:\n",
        new="    if 8 + length + end > size:\n",
        tests="tests/unit/utils/test_header.py::test_the_size_is_that_of_the_file",
    ),
    Mutant(
        trap="strangers: a header declares what is not there",
        file="sheeprlhf/utils/header.py",
        old="        if first != end:\n",
        new="        if first > end:\n",
        tests="tests/unit/utils/test_header.py::test_tensors_lie_end_to_end",
    ),
    Mutant(
        trap="strangers: a configuration names code",
        file="sheeprlhf/model/folder.py",
        old='        if "attn_implementation" in key or "experts_implementation" in key:\n',
        new='        if key == "attn_implementation":\n',
        tests=_FOLDERS,
    ),
    Mutant(
        trap="strangers: a shard is a path",
        file="sheeprlhf/model/folder.py",
        old='        if not shard.fullmatch(name) or ".." in name:\n',
        new="        if False:\n",
        tests="tests/unit/model/test_folder.py::test_a_shard_is_a_plain_name",
    ),
    Mutant(
        trap="strangers: adapters import a library",
        file="sheeprlhf/model/adapter.py",
        old="        if key not in _KNOWN and value not in _OFF:\n",
        new='        if key not in _KNOWN and value not in _OFF and key != "auto_mapping":\n',
        tests=f"{_CORPUS}[adapter configurations]",
    ),
    Mutant(
        trap="strangers: a template writes without end",
        file="sheeprlhf/model/template_probe.py",
        old="                    if length > _OUTPUT:\n",
        new="                    if length < 0:\n",
        tests=f"{_CORPUS}[chat templates]",
    ),
    Mutant(
        trap="strangers: writing through a link",
        file="sheeprlhf/utils/output.py",
        old="        if path.is_symlink():\n            raise",
        new="        if False:\n            raise",
        tests="tests/security/test_untrusted_runs.py::test_no_component_may_be_a_link",
    ),
    Mutant(
        trap="strangers: writing through a link",
        file="sheeprlhf/engine/rundir.py",
        old="    problems = link_problems(folder, _FILES, _FOLDERS)\n",
        new="    problems = link_problems(folder, _FILES)\n",
        tests="tests/security/test_untrusted_runs.py::test_a_run_that_has_a_link_is_not_continued",
    ),
    Mutant(
        trap="strangers: a folder of the user is deleted",
        file="sheeprlhf/engine/manifest.py",
        old="    if not is_ours(folder):\n",
        new="    if False:\n",
        tests="tests/unit/engine/test_checkpoint.py::test_a_folder_in_the_way_that_is_not_ours_is_kept",
    ),
    Mutant(
        trap="strangers: a folder of the user is deleted",
        file="sheeprlhf/engine/metrics.py",
        old=" and _is_sample(path):\n",
        new=":\n",
        tests="tests/security/test_untrusted_runs.py::test_folders_of_the_user_in_a_run_survive_its_continuation",
    ),
    Mutant(
        trap="secrets: those of the environment are shown",
        file="sheeprlhf/engine/redact.py",
        old="    secrets = _of_environment()\n",
        new="    secrets = []\n",
        tests="tests/security/test_secrets.py::test_no_canary_is_in_a_traceback",
    ),
    Mutant(
        trap="versions: a malicious one runs",
        file="sheeprlhf/utils/floors.py",
        old="    if public in BANNED.get(name, ()):\n",
        new="    if version in BANNED.get(name, ())[:1]:\n",
        tests="tests/security/test_versions.py::test_the_lists",
    ),
    Mutant(
        trap="versions: a malicious one runs",
        file="sheeprlhf/utils/floors.py",
        old="[:3]], before is None\n",
        new="[:3]], True\n",
        tests="tests/security/test_versions.py::test_the_lists",
    ),
    Mutant(
        trap="versions: a malicious one runs",
        file="sheeprlhf/command/export.py",
        old="    check_versions()\n",
        new="",
        tests="tests/security/test_versions.py::test_a_command_is_refused_before_it_imports_anything",
    ),
]
