"""Mistakes in the engines that sample rollouts that their tests notice."""

from tests.mutants.mutant import Mutant

_FILE = "sheeprlhf/model/engines.py"
_UNIT = "tests/unit/model/test_engines.py::test_"

MUTANTS = [
    Mutant(
        trap="engines: log-probabilities at another temperature",
        file=_FILE,
        old="(scores.float() / self._temperature).log_softmax(dim=-1)",
        new="scores.float().log_softmax(dim=-1)",
        tests=f"{_UNIT}log_probabilities_are_those_of_the_training_forward",
    ),
    Mutant(
        trap="engines: the distribution",
        file=_FILE,
        old="        temperature=temperature,\n        top_k=0,\n",
        new="        temperature=1.0,\n        top_k=0,\n",
        tests=f"{_UNIT}each_token_comes_as_often_as_it_is_likely",
    ),
    Mutant(  # transformers' own is 50
        trap="engines: the distribution",
        file=_FILE,
        old="        top_k=0,\n",
        new="        top_k=20,\n",
        tests=f"{_UNIT}each_token_comes_as_often_as_it_is_likely",
    ),
    Mutant(
        trap="engines: the model's own settings leak",
        file=_FILE,
        old="own_settings(model, settings), _seeded(uniforms[group[0]], model.device)",
        new="_seeded(uniforms[group[0]], model.device)",
        tests=f"{_UNIT}the_models_own_settings_do_not_leak",
    ),
    Mutant(
        trap="engines: all rollouts are alike",
        file=_FILE,
        old="    return int(uniforms_KN[0, 0] * 2**32)\n",
        new="    return 0\n",
        tests=f"{_UNIT}the_numbers_decide",
    ),
    Mutant(
        trap="engines: training's random numbers are used up",
        file=_FILE,
        old='    with torch.random.fork_rng([device] if device.type == "cuda" else []):\n',
        new="    if True:\n",
        tests=f"{_UNIT}log_probabilities_are_those_of_the_training_forward",
    ),
    Mutant(
        trap="engines: a response goes on behind its end",
        file=_FILE,
        old="            return ids[:number], logprobs[:number], True\n",
        new="            return ids, logprobs, True\n",
        tests=f"{_UNIT}a_stop_ends_a_response",
    ),
    Mutant(
        trap="engines: the option is not read",
        file="sheeprlhf/task/rollouts.py",
        old="ENGINES[cfg.engine](",
        new='ENGINES["native"](',
        tests="tests/e2e/test_engines.py",
    ),
]
