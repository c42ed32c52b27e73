"""Mistakes in sampling for reinforcement learning that its tests notice."""

from tests.mutants.mutant import Mutant

_CACHE, _ROWS, _SAMPLE = (f"sheeprlhf/model/{name}.py" for name in ("cache", "rows", "sample"))
_UNIT = "tests/unit/model/test_sample.py::test_"
_LOOP = f"{_UNIT}it_is_a_loop_without_cache_batch_or_padding"
_ENDS = f"{_UNIT}rows_that_end_do_not_disturb_the_others"

MUTANTS = [
    Mutant(
        trap="sampling: prompts of different forward passes are mixed up",
        file="sheeprlhf/model/cache.py",
        old="for of_parts in zip(*parts, strict=True)]",
        new="for of_parts in zip(*reversed(parts), strict=True)]",
        tests="tests/unit/model/test_sample.py",
    ),
    Mutant(  # every token at the position of the first
        trap="sampling: positions",
        file=_ROWS,
        old="        self._cache.next_token()\n        self._positions_B1 = self._positions_B1 + 1\n",
        new="        self._cache.next_token()\n",
        tests=f"{_LOOP}[gpt2-True]",
    ),
    Mutant(  # left padding counts as positions
        trap="sampling: positions",
        file=_ROWS,
        old="column_PW.clamp(min=0).to(device))",
        new="torch.arange(width).expand_as(column_PW).to(device))",
        tests=f"{_LOOP}[gpt2-False]",
    ),
    Mutant(  # a short prompt's responses see what fills its row
        trap="sampling: padding is seen",
        file=_CACHE,
        old="torch.where(empty_PW, -torch.inf, 0.0)",
        new="torch.where(empty_PW, 0.0, 0.0)",
        tests=f"{_LOOP}[llama-True]",
    ),
    Mutant(
        trap="sampling: a token is predicted one place off",
        file=_ROWS,
        old="return hidden_1TC[0, ends_P - 1]",
        new="return hidden_1TC[0, ends_P - 2]",
        tests=f"{_LOOP}[llama-True]",
    ),
    Mutant(  # the newest token does not see itself
        trap="sampling: a token is predicted one place off",
        file=_CACHE,
        old="rows, columns = len(query_BH1D), self._num_columns + 1\n",
        new="rows, columns = len(query_BH1D), max(1, self._num_columns)\n",
        tests=f"{_LOOP}[llama-True]",
    ),
    Mutant(  # log-probabilities at temperature 1
        trap="sampling: temperature",
        file=_SAMPLE,
        old="logprobs_BV.gather(1, ids_B1)[:, 0]",
        new="logits_BV.float().log_softmax(dim=-1).gather(1, ids_B1)[:, 0]",
        tests=f"{_LOOP}[llama-True]",
    ),
    Mutant(
        trap="sampling: temperature",
        file=_SAMPLE,
        old="    if not temperature > 0:\n",
        new="    if temperature < 0:\n",
        tests=f"{_UNIT}temperatures_that_are_refused",
    ),
    Mutant(
        trap="sampling: with dropout",
        file=_SAMPLE,
        old="    with eval_mode(model):\n",
        new="    if True:\n",
        tests=f"{_LOOP}[gpt2-True]",
    ),
    Mutant(
        trap="sampling: in half precision",
        file=_SAMPLE,
        old="    scaled_BV = logits_BV.float() / temperature\n",
        new="    scaled_BV = logits_BV / temperature\n",
        tests=f"{_UNIT}draw_computes_in_float32",
    ),
    Mutant(
        trap="sampling: EOS",
        file=_SAMPLE,
        old="        lengths_R[live_B] = step + 1\n",
        new="        lengths_R[live_B] = step + 1 - np.isin(ids_RN[live_B, step], end_ids)\n",
        tests=f"{_UNIT}eos_is_part_of_the_response_and_ends_it",
    ),
    Mutant(  # cut counts as finished
        trap="sampling: EOS",
        file=_SAMPLE,
        old="        ended_B = finished_R[live_B] | (step + 1 == num_new)\n",
        new="        finished_R[live_B] |= step + 1 == num_new\n        ended_B = finished_R[live_B]\n",
        tests=_ENDS,
    ),
    Mutant(  # `stop` forgets what EOS said
        trap="sampling: EOS",
        file=_SAMPLE,
        old="live_B[~finished_R[live_B]]",
        new="live_B",
        tests=_ENDS,
    ),
    Mutant(
        trap="sampling: a row that leaves takes another's place with it",
        file=_CACHE,
        old="                tensor[targets, :, :columns] = tensor[order[targets], :, :columns]\n",
        new="                pass\n",
        tests=_ENDS,
    ),
    Mutant(
        trap="sampling: a row that leaves takes another's place with it",
        file=_CACHE,
        old="            slots_B = place_P[prompts_B] * self._num_responses + numbers_B\n",
        new="            slots_B = prompts_B % len(order_P) * self._num_responses + numbers_B\n",
        tests=_ENDS,
    ),
    Mutant(
        trap="sampling: a row that leaves takes another's place with it",
        file=_ROWS,
        old="        self._cache.keep(order_B)\n        self._positions_B1 = self._positions_B1[order_B]\n",
        new="        self._cache.keep(order_B)\n        self._positions_B1 = self._positions_B1[: len(order_B)]\n",
        tests=_ENDS,
    ),
    Mutant(
        trap="sampling: depends on the batch",
        file=_SAMPLE,
        old="draw_next(logits_BV, uniforms_RN[index_B, step])",
        new="draw_next(logits_BV, uniforms_RN[: len(index_B), step])",
        tests=_ENDS,
    ),
    Mutant(
        trap="sampling: depends on the batch",
        file=_SAMPLE,
        old="            results |= zip(group, sampled, strict=True)\n",
        new="            results |= zip(range(len(results), len(prompts)), sampled)\n",
        tests=f"{_UNIT}the_batch_its_order_and_its_cut_change_nothing",
    ),
    Mutant(  # a token of probability 0 is taken
        trap="sampling: the distribution",
        file=_SAMPLE,
        old="limit_B1, right=True)",
        new="limit_B1)",
        tests=f"{_UNIT}draw_at_the_ends",
    ),
    Mutant(
        trap="sampling: the distribution",
        file=_SAMPLE,
        old="dtype=torch.float64)\n    # The last",
        new="dtype=torch.bfloat16)\n    # The last",
        tests=f"{_UNIT}draw_takes_each_token_as_often_as_it_is_likely",
    ),
]
