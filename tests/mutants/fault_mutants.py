"""Mistakes around signals, killed processes and full disks that the tests notice."""

from tests.mutants.mutant import Mutant

_PROCESSES = "tests/unit/utils/test_processes.py"

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
        old="    with ignored(SAVE_SIGNAL), reliable_sigint() as interrupts:",
        new="    with reliable_sigint() as interrupts:",
        tests="tests/faults/test_signals.py::test_sigusr1_saves_and_goes_on",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/utils/processes.py",
        old="        return die_with_parent, (os.getpid(),)\n",
        new="        return int, ()\n",
        tests=f"{_PROCESSES}::test_a_process_of_a_pool_ends_with_its_parent_while_it_imports",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/data/prepare.py",
        old="start_bound, (BoundToThis(), _start_worker, tokenize, stop))",
        new="_start_worker, (tokenize, stop))",
        tests="tests/unit/data/test_prepare.py::test_the_tokenising_processes_end_with_a_killed_one",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/utils/processes.py",
        old="        if isinstance(of.exc_value, KeyboardInterrupt | Terminated):\n",
        new="        if False:\n",
        tests=f"{_PROCESSES}::test_ctrl_c_at_any_time_is_no_error_and_no_traceback",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/utils/processes.py",
        old="        if self.leaving:\n",
        new="        if False:\n",
        tests=f"{_PROCESSES}::test_ctrl_c_at_any_time_is_no_error_and_no_traceback",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/cli.py",
        old="        if just_interrupted():\n",
        new="        if False:\n",
        tests=f"{_PROCESSES}::test_ctrl_c_at_any_time_is_no_error_and_no_traceback",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/cli.py",
        old="        atexit.register(ignore_interrupts)",
        new="        pass",
        tests=f"{_PROCESSES}::test_ctrl_c_at_the_very_end_changes_nothing",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/launch.py",
        old="        if full is not None:\n            raise full from error\n",
        new="",
        tests="tests/faults/test_disk.py::test_records_that_find_no_room_are_named",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/utils/processes.py",
        old="    if before.get(signal.SIGHUP) is signal.SIG_IGN:\n",
        new="    if False:\n",
        tests="tests/faults/test_signals.py::test_a_closed_terminal_stops_no_save",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/utils/streams.py",
        old="_GONE = (errno.EIO, errno.EPIPE)",
        new="_GONE = (errno.EPIPE,)",
        tests="tests/faults/test_signals.py::test_a_closed_terminal_stops_no_save",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/model/memory.py",
        old="    with interrupts_wait(), FakeTensorMode(",
        new="    with FakeTensorMode(",
        tests="tests/unit/model/test_memory.py::test_ctrl_c_waits_for_the_end_of_the_plan",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/engine/metrics.py",
        old='    return stamp if stamp > last else f"{last}0"\n',
        new="    return stamp\n",
        tests="tests/unit/engine/test_metrics.py::test_a_new_name_sorts_after_all_earlier_ones",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/structure/earlier.py",
        old="order + _TICK for order in orders",
        new="now for _ in orders",
        tests="tests/unit/engine/test_rundir.py::test_the_newest_run_is_the_last_one_made_whatever_the_clock_says",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/utils/records.py",
        old='if len(text.lstrip("-")) <= MAX_DIGITS else _TOO_LARGE',
        new="if text else _TOO_LARGE",
        tests="tests/unit/command/test_report.py::test_what_is_damaged_or_missing_is_said_and_the_rest_shown",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/engine/checkpoint.py",
        old="            verify_manifest(folder)\n            read_state(folder)\n",
        new="            verify_manifest(folder)\n",
        tests="tests/unit/engine/test_checkpoint.py::test_a_state_that_cannot_be_right_falls_back_to_the_checkpoint_before",
    ),
    Mutant(
        trap="signals, kills and full disks",
        file="sheeprlhf/utils/streams.py",
        old="                self.error = error\n",
        new="                pass\n",
        tests="tests/unit/utils/test_streams.py::test_a_full_disk_is_remembered",
    ),
]
