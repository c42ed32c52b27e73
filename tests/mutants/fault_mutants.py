"""Mistakes around signals, killed processes and full disks that the tests notice."""

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/utils/processes.py",
        old="    parent = os.getppid() if parent is None else parent\n",
        new="    parent = os.getppid()\n",
        tests="tests/unit/engine/test_run.py::test_who_was_started_by_a_process_that_is_gone_ends_too",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/cli.py",
        old='ignored(signal.SIGUSR1) if verb == "train" else nullcontext()',
        new="nullcontext()",
        tests="tests/faults/test_signals.py::test_sigusr1_saves_and_goes_on",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/data/prepare.py",
        old="    die_with_parent(parent)\n",
        new="",
        tests="tests/unit/data/test_prepare.py::test_the_tokenising_processes_end_with_a_killed_one",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/launch.py",
        old="        if full is not None:\n            raise full from error\n",
        new="",
        tests="tests/faults/test_disk.py::test_records_that_find_no_room_are_named",
    ),
]
