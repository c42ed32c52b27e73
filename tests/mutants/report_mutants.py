"""Mutants of the report."""

from tests.mutants.mutant import Mutant

_PAGE = "tests/unit/command/test_report.py::"
_CHART = "tests/unit/command/test_report_chart.py::"

MUTANTS = [
    Mutant(  # a sample's script runs
        trap="report",
        file="sheeprlhf/command/report_html.py",
        old="Html(html.escape(redact_text(plain_text(str(value)))))",
        new="Html(redact_text(plain_text(str(value))))",
        tests=f"{_PAGE}test_nothing_that_a_file_says_is_obeyed",
    ),
    Mutant(  # secrets of a sample are published
        trap="report",
        file="sheeprlhf/command/report_html.py",
        old="html.escape(redact_text(plain_text(str(value))))",
        new="html.escape(plain_text(str(value)))",
        tests=f"{_PAGE}test_secrets_and_control_characters_are_not_shown",
    ),
    Mutant(  # a stranger's run brings any file of the user's into the page
        trap="report",
        file="sheeprlhf/command/report_record.py",
        old='real_path(folder / "metrics.csv", folder)',
        new='folder / "metrics.csv"',
        tests=f"{_PAGE}test_no_link_of_a_strangers_run_is_followed",
    ),
    Mutant(  # a file of the user's is overwritten
        trap="report",
        file="sheeprlhf/command/report.py",
        old='(f\'name="generator" content="{MARK}"\', f"Software\\0{MARK}")',
        new="(MARK,)",
        tests=f"{_PAGE}test_only_reports_are_replaced",
    ),
    Mutant(  # half a number of a run in progress is drawn
        trap="report",
        file="sheeprlhf/command/report_record.py",
        old='.split("\\n")[:-1]:',
        new='.split("\\n"):',
        tests=f"{_PAGE}test_a_half_written_row_of_a_run_in_progress_is_not_shown",
    ),
    Mutant(  # what is left of a row that the limit has cut becomes a point
        trap="report",
        file="sheeprlhf/command/report_record.py",
        old='content = content.partition(b"\\n")[2]',
        new="content = bytes(content)",
        tests=f"{_PAGE}test_of_large_records_the_newest_part_is_shown",
    ),
    Mutant(  # spikes of long curves disappear
        trap="report",
        file="sheeprlhf/command/report_chart.py",
        old="line.highs.append(max(values))",
        new="line.highs.append(values[-1])",
        tests=f"{_CHART}test_thinning_loses_no_extreme_and_no_mean",
    ),
    Mutant(  # losses of different tasks share an axis
        trap="report",
        file="sheeprlhf/command/report_chart.py",
        old='title = f"{tag} of {tasks[number]}" if several else tag',
        new="title = tag",
        tests=f"{_CHART}test_losses_of_different_tasks_have_charts_of_their_own",
    ),
]
