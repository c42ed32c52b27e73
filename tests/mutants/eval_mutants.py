"""Mistakes in evaluations that their tests notice."""

from tests.mutants.mutant import Mutant

_ANSWERS = "sheeprlhf/task/eval/answers.py"
_REWARD = "sheeprlhf/task/eval/reward.py"
_FIGURES = "tests/unit/task/test_evaluation_figures.py"
_PLAIN = "tests/e2e/test_evaluations.py::test_scores_win_rate_and_kl_are_those_of_plain_loops"
_IMPLICIT = "tests/e2e/test_evaluations.py::test_the_implicit_reward_is_that_of_a_plain_loop"
_TEXTS = "tests/e2e/test_rouge.py::test_texts_and_scores_are_the_same_for_any_batches"

MUTANTS = [
    Mutant(  # prompt tokens of left-padded rows are taken for the response
        trap="rouge",
        file="sheeprlhf/model/generate.py",
        old="for row in output[:, width:].cpu().numpy()]",
        new="for row in output[:, min(map(len, prompts)) :].cpu().numpy()]",
        tests="tests/unit/model/test_generate.py::test_greedy_is_an_argmax_loop_alone_and_left_padded",
    ),
    Mutant(  # texts in the order of the processes that wrote them, references in that of the rows
        trap="rouge",
        file=_ANSWERS,
        old="[found[row] for row in range(len(prompts))])",
        new="list(found.values()))",
        tests="tests/distributed/test_rouge.py::test_two_processes_equal_one",
    ),
    Mutant(  # special tokens are part of the text
        trap="rouge",
        file="sheeprlhf/task/rollouts.py",
        old="tokenizer.decode(ids.tolist(), skip_special_tokens=True)",
        new="tokenizer.decode(ids.tolist())",
        tests=_TEXTS,
    ),
    Mutant(  # a 90 % interval
        trap="rouge",
        file="sheeprlhf/task/eval/interval.py",
        old="[2.5, 97.5]",
        new="[5.0, 95.0]",
        tests="tests/unit/task/test_rouge_metric.py::test_an_interval_is_that_of_the_mean_and_repeats",
    ),
    Mutant(  # the KL is a mean over tokens
        trap="evaluation",
        file=_ANSWERS,
        old="return np.add.reduceat(apart_N, starts)",
        new="return np.add.reduceat(apart_N, starts) / np.array(answers.rollout.response_lengths)",
        tests=f"{_FIGURES}::test_kl_is_summed_over_the_tokens_of_each_response",
    ),
    Mutant(  # a tie is a win
        trap="evaluation",
        file=_REWARD,
        old="won_N = (scores_N > others_N) + 0.5 * (scores_N == others_N)",
        new="won_N = 1.0 * (scores_N >= others_N)",
        tests="tests/e2e/test_evaluations.py::test_a_policy_that_learnt_nothing_ties_with_its_start",
    ),
    Mutant(  # the reference is the model, not the fine-tuning that the run began with
        trap="evaluation",
        file="sheeprlhf/task/eval/load.py",
        old="of = (cfg.model, start.run_dir, start.weights, tokenizer)",
        new="of = (cfg.model, None, start.weights, tokenizer)",
        tests=_IMPLICIT,
    ),
    Mutant(  # the better response is the second
        trap="evaluation",
        file="sheeprlhf/task/eval/preference.py",
        old="found += [(scores[i], scores[j], lengths[i] - lengths[j])",
        new="found += [(scores[j], scores[i], lengths[i] - lengths[j])",
        tests=f"{_FIGURES}::test_pairs_of_rows_with_two_and_three_responses",
    ),
    Mutant(  # the best of n with replacement: biased
        trap="evaluation",
        file="sheeprlhf/task/eval/frontier.py",
        old="math.comb(i, n - 1) / math.comb(num, n) for i",
        new="((i + 1) / num) ** n - (i / num) ** n for i",
        tests=f"{_FIGURES}::test_the_expected_best_is_the_mean_over_all_choices",
    ),
    Mutant(  # each rank draws with the numbers of its own first rows
        trap="evaluation",
        file=_ANSWERS,
        old="_by_sampler(cfg, writer, part, uniforms[mine], stop",
        new="_by_sampler(cfg, writer, part, uniforms[: len(mine)], stop",
        tests="tests/distributed/test_evaluations.py::test_two_processes_equal_one",
    ),
    Mutant(  # a judge is trusted that is right less often than a coin
        trap="evaluation",
        file="sheeprlhf/task/eval/judge.py",
        old="return self.interval[0] <= 0.5 <= self.interval[1]",
        new="return self.interval[0] <= 0.5 < self.interval[1] - 0.2",
        tests=f"{_FIGURES}::test_a_judge_that_a_coin_equals_is_known",
    ),
]
