"""Mistakes in rewards that their tests notice."""

from tests.mutants.mutant import Mutant

_CALL = "sheeprlhf/reward/call.py"
_CHECKS = "sheeprlhf/structure/reward_checks.py"
_FUNCTIONS = "sheeprlhf/reward/functions.py"
_LOAD = "sheeprlhf/reward/call.py"
_MOMENTS = "sheeprlhf/reward/score.py"
_PENALTIES = "sheeprlhf/reward/score.py"
_SCORE = "sheeprlhf/reward/score.py"
_OF_CALL = "tests/unit/reward/test_call.py"
_OF_CHECKS = "tests/unit/structure/test_reward_checks.py"
_OF_FUNCTIONS = "tests/unit/reward/test_functions.py"
_OF_SCORE = "tests/unit/reward/test_score.py"
_OF_SIGNATURE = "tests/unit/reward/test_signature.py"
_SIGNATURE = "sheeprlhf/reward/call.py"

MUTANTS = [
    Mutant(
        trap="reward: the standard deviation is that of a sample",
        file=_MOMENTS,
        old="math.sqrt(self.m2 / self.count) if self.count else 0.0\n",
        new="math.sqrt(self.m2 / max(1, self.count - 1)) if self.count else 0.0\n",
        tests=f"{_OF_SCORE}::test_running_moments_are_numpys_over_all_batches",
    ),
    Mutant(
        trap="reward: a long response costs too early, too late or too much",
        file=_PENALTIES,
        old="return min(1.0, max(0.0, ",
        new="return min(1.0, max(-1.0, ",
        tests=f"{_OF_FUNCTIONS}::test_each_penalty",
    ),
    Mutant(
        trap="reward: weights or penalties are misapplied",
        file=_SCORE,
        old="math.fsum(weight * score for weight, score in",
        new="math.fsum(abs(weight) * score for weight, score in",
        tests=f"{_OF_SCORE}::test_a_weighted_sum",
    ),
    Mutant(
        trap="reward: weights or penalties are misapplied",
        file=_SCORE,
        old="            score - penalty(",
        new="            score + penalty(",
        tests=f"{_OF_SCORE}::test_penalties_are_not_normalised",
    ),
    Mutant(
        trap="reward: weights or penalties are misapplied",
        file=_SCORE,
        old="max(-cfg.clip, min(cfg.clip, score))",
        new="min(cfg.clip, score)",
        tests=f"{_OF_SCORE}::test_clipping_comes_after_normalising",
    ),
    Mutant(
        trap="reward: a cut response is not penalised, or a whole one is",
        file=_PENALTIES,
        old="    if num_tokens < cfg.min_response_length:\n",
        new="    if num_tokens <= cfg.min_response_length:\n",
        tests=f"{_OF_FUNCTIONS}::test_each_penalty",
    ),
    Mutant(
        trap="reward: the rule of a dataset can be gamed",
        file=_FUNCTIONS,
        old="        and len(text.splitlines()) == 1\n",
        new="",
        tests=f"{_OF_FUNCTIONS}::test_imperative",
    ),
    Mutant(
        trap="reward: the rule of a dataset can be gamed",
        file=_FUNCTIONS,
        old="        and repeated_share(text) <= MOST_REPEATED\n",
        new="",
        tests=f"{_OF_FUNCTIONS}::test_imperative",
    ),
    Mutant(
        trap="reward: the rule of a dataset can be gamed",
        file=_FUNCTIONS,
        old='        and style_of(text) == "imperative"\n',
        new='        and style_of(text) != "other"\n',
        tests=f"{_OF_FUNCTIONS}::test_imperative",
    ),
    Mutant(
        trap="reward: the rule of a dataset can be gamed",
        file=_FUNCTIONS,
        old="min(found, target_length) / max(found, target_length)",
        new="min(found, target_length) / target_length",
        tests=f"{_OF_FUNCTIONS}::test_length",
    ),
    Mutant(
        trap="reward: what a function returns is taken as it is",
        file=_CALL,
        old="            if score is None or not math.isfinite(score):\n",
        new="            if score is None:\n",
        tests=f"{_OF_CALL}::test_what_is_no_list_of_finite_numbers",
    ),
    Mutant(
        trap="reward: what a function returns is taken as it is",
        file=_CALL,
        old="        if len(values) != count:\n",
        new="        if len(values) < count:\n",
        tests=f"{_OF_CALL}::test_what_is_no_list_of_finite_numbers",
    ),
    Mutant(
        trap="reward: the current directory hides installed modules",
        file=_LOAD,
        old="    sys.path.append(folder)\n",
        new="    sys.path.insert(0, folder)\n",
        tests=f"{_OF_CALL}::test_a_module_of_the_path_comes_first",
    ),
    Mutant(
        trap="reward: the current directory hides installed modules",
        file=_LOAD,
        old="            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]\n",
        new="            pass\n",
        tests=f"{_OF_CALL}::test_the_path_is_clean_after_an_error_too",
    ),
    Mutant(
        trap="reward: a check runs the user's code",
        file="sheeprlhf/structure/user_code.py",
        old="    spec = _installed(first) or PathFinder.find_spec(first, [os.getcwd()])\n",
        new="    sys.path.append(os.getcwd())\n    spec = importlib.util.find_spec(module)\n    rest = []\n",
        tests=f"{_OF_CHECKS}::test_functions_that_may_be_there",
    ),
    Mutant(
        trap="reward: an option that nothing reads is taken",
        file=_CHECKS,
        old="getattr(BuiltinOptionsConfig, name) and not reading:\n",
        new="getattr(BuiltinOptionsConfig, name) and not readers:\n",
        tests=f"{_OF_CHECKS}::test_options_that_cannot_work",
    ),
    Mutant(
        trap="reward: a stranger's file names the code that runs",
        file="sheeprlhf/structure/strangers.py",
        old='        if key in _FUNCTIONS and key not in given and is_users_own(text.rpartition("*")[2]):\n',
        new='        if key in _FUNCTIONS and key not in given and ":" in text:\n',
        tests=f"{_OF_CHECKS}::test_a_file_names_no_function_of_anybodys",
    ),
    Mutant(
        trap="reward: a weight that is no finite number is taken",
        file="sheeprlhf/structure/reward.py",
        old="not math.isfinite(term.weight)",
        new="math.isinf(term.weight)",
        tests=f"{_OF_CHECKS}::test_what_is_no_term",
    ),
]
