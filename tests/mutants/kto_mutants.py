"""Mistakes in KTO that its tests notice."""

from tests.mutants.mutant import Mutant

_KTO = "sheeprlhf/task/train/kto.py"
_STEP = "tests/unit/task/test_kto.py"

MUTANTS = [
    Mutant(
        trap="kto: the KL is estimated from matched pairs",
        file="sheeprlhf/data/mismatch.py",
        old="        [response] = super().example(int(self.partners[index])).responses\n",
        new="        [response] = own.responses\n",
        tests=f"{_STEP}::test_a_step_is_the_papers",
    ),
    Mutant(
        trap="kto: the KL is estimated from matched pairs",
        file="sheeprlhf/data/mismatch.py",
        old="    partners_N[same_N] = next_start_N[partners_N[same_N]]\n",
        new="",
        tests="tests/unit/data/test_mismatch.py::test_another_prompt_always",
    ),
    Mutant(
        trap="kto: the KL is estimated from matched pairs",
        file="sheeprlhf/data/mismatch.py",
        old="    partners_N = (rows_N + longest_run) % len(rows_N)\n",
        new="    partners_N = (rows_N + 1) % len(rows_N)\n",
        tests="tests/unit/data/test_mismatch.py::test_every_response_is_lent_once_where_prompts_stand_together",
    ),
    Mutant(
        trap="kto: the KL is not that of the step",
        file=_KTO,
        old='    return max(0.0, evaluate(fabric, module, mismatched, mismatched_loss)["loss"])\n',
        new='    return evaluate(fabric, module, mismatched, mismatched_loss)["loss"]\n',
        tests=f"{_STEP}::test_a_step_is_the_papers",
    ),
    Mutant(
        trap="kto: the KL is not that of the step",
        file=_KTO,
        old="    losses_S = kto(h_S, desirable_S, h_S.new_tensor(kl), task.beta, *weights)\n",
        new="    losses_S = kto(h_S, desirable_S, h_S.mean() + 0 * kl, task.beta, *weights)\n",
        tests=f"{_STEP}::test_the_cut_changes_nothing",
    ),
    Mutant(
        trap="kto: rewards are averaged over the examples of both labels",
        file=_KTO,
        old='means[f"{name}/{label}"] / share for name',
        new='means[f"{name}/{label}"] for name',
        tests=f"{_STEP}::test_a_step_is_the_papers",
    ),
    Mutant(
        trap="kto: a label is misread",
        file="sheeprlhf/data/labels.py",
        old="        return (example.chosen, example.rejected), (True, False)\n",
        new="        return (example.chosen, example.rejected), (True, True)\n",
        tests="tests/unit/data/test_labels.py::test_a_pair_becomes_two_examples",
    ),
    Mutant(
        trap="kto: a label is misread",
        file="sheeprlhf/data/labels.py",
        old="    if isinstance(label, str) and label.strip().casefold() in _SPELLINGS:\n"
        "        return _SPELLINGS[label.strip().casefold()]\n",
        new="    if isinstance(label, str):\n        return bool(label)\n",
        tests="tests/unit/data/test_labels.py::test_nothing_else_is_a_label",
    ),
    Mutant(
        trap="kto: the KL is not that of all ranks",
        file=_KTO,
        old="            kl = estimate_kl(fabric, module, mismatched_batches)\n",
        new='            alone = Fabric(accelerator="cpu", devices=1)\n'
        "            kl = estimate_kl(alone, module, mismatched_batches) if mismatched_batches else 0.0\n",
        tests="tests/distributed/test_kto.py::test_two_processes_equal_one",
    ),
]
