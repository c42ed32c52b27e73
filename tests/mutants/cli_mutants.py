"""Mistakes in the command line and the configuration."""

from tests.mutants.mutant import Mutant

BAD = "tests/unit/cli/test_bad_command_lines.py"
STRANGERS = "tests/unit/structure/test_strangers_files.py"
REGISTRY = "tests/unit/structure/test_registry.py"
RUN = "tests/unit/cli/test_run.py"

MUTANTS = [
    Mutant(  # a secret by name is taken
        trap="20",
        file="sheeprlhf/structure/overrides.py",
        old="        if is_secret_name(override.key_or_group) and not _is_option(override.key_or_group):",
        new="        if False:",
        tests=f"{BAD}::test_a_secret_on_the_command_line_is_refused_by_name_and_never_repeated",
    ),
    Mutant(  # a secret by its look is taken, and repeated in a message
        trap="20",
        file="sheeprlhf/structure/overrides.py",
        old="        if is_secret_value(word):",
        new="        if False:",
        tests=f"{BAD}::test_a_secret_on_the_command_line_is_refused_by_name_and_never_repeated",
    ),
    Mutant(  # secrets of an exception's text reach the screen
        trap="20",
        file="sheeprlhf/cli.py",
        old='    return redact_text("; ".join(',
        new='    return str("; ".join(',
        tests=f"{RUN}::test_an_error_is_a_message_and_an_exit_code",
    ),
    Mutant(  # choices in one letter case only
        trap="cli",
        file="sheeprlhf/structure/registry.py",
        old="if s.casefold() == value.casefold()]",
        new="if s == value]",
        tests=f"{REGISTRY}::test_choices_are_taken_in_any_letter_case_and_stored_in_one",
    ),
    Mutant(  # torch is imported for --help
        trap="cli",
        file="sheeprlhf/cli.py",
        old="import functools\n",
        new="import functools\nimport torch\n",
        tests="tests/unit/cli/test_imports.py",
    ),
    Mutant(  # the task can change its configuration
        trap="cli",
        file="sheeprlhf/structure/registry.py",
        old="        typed = apply_dry_run(typed)\n    typed.lock()",
        new="        typed = apply_dry_run(typed)",
        tests=f"{REGISTRY}::test_a_typed_configuration_is_read_only_and_hashable",
    ),
    Mutant(  # a recipe installs a callback
        trap="cli",
        file="sheeprlhf/structure/config_files.py",
        old="if key not in _OF_HYDRA or value != _OF_HYDRA[key]:",
        new="if False:",
        tests="tests/security/test_config_files.py::test_the_files_of_a_package_are_checked_too",
    ),
    Mutant(  # a value of the command line reads the environment
        trap="20",
        file="sheeprlhf/structure/strangers.py",
        old="        if _RESOLVER.search(text):",
        new="        if False:",
        tests=f"{BAD}",
    ),
    Mutant(  # a recipe trusts a model's code
        trap="cli",
        file="sheeprlhf/structure/strangers.py",
        old="    if trusted and _TRUST not in",
        new="    if False and _TRUST not in",
        tests=STRANGERS,
    ),
    Mutant(  # a saved run trusts a model's code
        trap="cli",
        file="sheeprlhf/structure/saved.py",
        old='        saved["library_cfg"]["trust_remote_code"] = False',
        new='        saved["library_cfg"].setdefault("trust_remote_code", False)',
        tests=f"{RUN}::test_a_saved_run_cannot_switch_on_remote_code",
    ),
    Mutant(  # aliases of a saved configuration are expanded
        trap="cli",
        file="sheeprlhf/structure/saved.py",
        old="        if self.check_event(yaml.events.AliasEvent):",
        new="        if False:",
        tests="tests/unit/structure/test_saved.py",
    ),
    Mutant(  # the seed does not tell two runs apart
        trap="cli",
        file="sheeprlhf/structure/registry.py",
        old='*("resume", "resume_from"',
        new='*("seed", "resume", "resume_from"',
        tests=f"{REGISTRY}::test_what_changes_the_result_changes_the_hash",
    ),
    Mutant(  # nothing is seeded
        trap="cli",
        file="sheeprlhf/launch.py",
        old="    torch.manual_seed(config.seed)\n",
        new="",
        tests=f"{RUN}::test_everything_random_is_seeded",
    ),
    Mutant(  # a failed job of a sweep goes unnoticed
        trap="cli",
        file="sheeprlhf/cli.py",
        old="    return code if code > 128 else failed or code",
        new="    return 0",
        tests=f"{RUN}::test_a_failed_job_does_not_end_the_sweep_but_its_exit_code_counts",
    ),
    Mutant(  # Hydra leaves its multirun.yaml and directories
        trap="cli",
        file="sheeprlhf/cli.py",
        old="            shutil.rmtree(sweep_dir, ignore_errors=True)",
        new="            shutil.rmtree(sweep_dir + 'x', ignore_errors=True)",
        tests=f"{RUN}::test_a_sweep_makes_one_run_of_each_and_leaves_no_file_of_hydra",
    ),
]
