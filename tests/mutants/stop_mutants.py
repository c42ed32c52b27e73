"""Mistakes in stop strings that their tests notice."""

from tests.mutants.mutant import Mutant

_STOP = "sheeprlhf/model/stop.py"
_UNIT = "tests/unit/model/test_stop.py::test_"
_ROLLOUT = "tests/unit/task/test_stop_strings.py::test_tokens_stay_and_the_text_is_cut"

MUTANTS = [
    Mutant(  # a decoder drops the first piece's space
        trap="stop strings: the end that is looked at is too short",
        file=_STOP,
        old="default=0) + _MARGIN\n",
        new="default=0) // 2\n",
        tests=f"{_UNIT}it_ends_where_the_whole_text_first_has_a_string",
    ),
    Mutant(
        trap="stop strings: the end that is looked at is too short",
        file=_STOP,
        old="        written = ids[~np.isin(ids, self._special)]\n",
        new="        written = ids\n",
        tests=f"{_UNIT}it_ends_where_the_whole_text_first_has_a_string",
    ),
    Mutant(  # half a character at the beginning of the end
        trap="stop strings: the end alone decides",
        file=_STOP,
        old=" >= 0 and self._found(self._decode(written)) >= 0\n",
        new=" >= 0\n",
        tests=f"{_UNIT}only_the_end_is_decoded_until_it_has_a_string",
    ),
    Mutant(
        trap="stop strings: every token costs the whole text",
        file=_STOP,
        old="self._decode(written[-self._tail :])",
        new="self._decode(written)",
        tests=f"{_UNIT}only_the_end_is_decoded_until_it_has_a_string",
    ),
    Mutant(
        trap="stop strings: the text is not cut at the first",
        file=_STOP,
        old="        return min((place for",
        new="        return max((place for",
        tests=f"{_UNIT}the_text_before_the_first_string_is_left",
    ),
    Mutant(
        trap="stop strings: nothing gives them to the sampler",
        file="sheeprlhf/task/rollouts.py",
        old="            stop=stop if stop else None,\n",
        new="            stop=None,\n",
        tests=_ROLLOUT,
    ),
    Mutant(
        trap="stop strings: rewards see them",
        file="sheeprlhf/task/rollouts.py",
        old="responses=[stop.text(response) for response in responses]",
        new="responses=[text(response) for response in responses]",
        tests=_ROLLOUT,
    ),
    Mutant(
        trap="stop strings: shown texts go on",
        file="sheeprlhf/model/generate.py",
        old="StoppingCriteriaList([Stops(stop, width)] if stop else [])",
        new="StoppingCriteriaList([])",
        tests=f"{_UNIT}shown_texts_end_there_too",
    ),
]
