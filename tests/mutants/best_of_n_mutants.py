"""Mistakes in best of n that its tests notice."""

from tests.mutants.mutant import Mutant

_ROWS, _TASK = "sheeprlhf/task/best_rows.py", "sheeprlhf/task/train/best_of_n.py"
_UNIT = "tests/unit/task/test_best_rows.py::test_"
_STOPPED = "tests/e2e/test_best_of_n.py::test_a_run_that_was_stopped_ends_in_the_same_bytes"

MUTANTS = [
    Mutant(
        trap="best of n: the wrong response is kept",
        file=_ROWS,
        old="np.where(finished, scores, -np.inf).argmax()",
        new="np.where(finished, scores, -np.inf).argmin()",
        tests=f"{_UNIT}the_best_that_ended_is_kept",
    ),
    Mutant(
        trap="best of n: a cut response is kept",
        file=_ROWS,
        old="np.where(finished, scores, -np.inf).argmax()",
        new="scores.argmax()",
        tests=f"{_UNIT}the_best_that_ended_is_kept",
    ),
    Mutant(
        trap="best of n: one prompt gets another's response",
        file=_ROWS,
        old="        place = number * num_responses + chosen\n",
        new="        place = number + chosen\n",
        tests=f"{_UNIT}a_row_is_its_prompt_with_its_best_response",
    ),
    Mutant(
        trap="best of n: dropped rows are written",
        file=_ROWS,
        old=' for row in rows if row["fate"] == "kept")',
        new=" for row in rows)",
        tests=f"{_UNIT}a_row_is_its_prompt_with_its_best_response",
    ),
    Mutant(
        trap="best of n: the bound on the KL",
        file=_ROWS,
        old="    return math.log(n) - (n - 1) / n\n",
        new="    return math.log(n)\n",
        tests=f"{_UNIT}the_bound_is_the_kl_of_the_best_of_n_of_different_numbers",
    ),
    Mutant(
        trap="best of n: a resumed run does the work again",
        file=_TASK,
        old="if not is_done)",
        new=")",
        tests=_STOPPED,
    ),
    Mutant(
        trap="best of n: an option that it does not read",
        file="sheeprlhf/structure/task_checks.py",
        old="        yield from _best_of_n_problems(config)\n",
        new="        pass\n",
        tests=f"{_UNIT}what_it_does_not_read_is_refused",
    ),
]
