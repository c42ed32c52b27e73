"""Mistakes in reward models and preference optimisation that their tests notice."""

from tests.mutants.mutant import Mutant

_RM_LOSS, _DPO_LOSS = "sheeprlhf/loss/reward.py", "sheeprlhf/loss/dpo.py"
_DPO, _RM = "sheeprlhf/task/train/dpo.py", "sheeprlhf/task/train/rm.py"
_START, _REFERENCE, _LORA = "sheeprlhf/task/start.py", "sheeprlhf/task/reference.py", "sheeprlhf/model/lora.py"
_SCALAR, _REWARD, _COLLATE = "sheeprlhf/model/scalar.py", "sheeprlhf/agent/reward.py", "sheeprlhf/data/collate.py"
_CHAINS, _E2E_RM, _E2E_DPO = (f"tests/e2e/test_{name}.py" for name in ("chains", "rm", "dpo"))
_PARITY, _UNIT_RM, _UNIT_DPO = (
    "tests/parity/test_pairs.py",
    "tests/unit/loss/test_reward.py",
    "tests/unit/loss/test_dpo.py",
)
_SCALAR_TEST = "tests/unit/model/test_scalar.py"

MUTANTS = [
    Mutant(  # a score depends on the padding: read at the row's last place
        trap="2 score",
        file=_COLLATE,
        old="sources[-1], target_ids[-1] = own[-1:], response[-1:]",
        new="sources[-1], target_ids[-1] = own[-1:] * 0 + input_ids.size - 1, response[-1:]",
        tests=f"{_PARITY}::test_a_score_is_the_same_in_any_company",
    ),
    Mutant(  # the score after the last token but one: before EOS
        trap="2 score",
        file=_COLLATE,
        old="sources[-1], target_ids[-1] = own[-1:], response[-1:]",
        new="sources[-1], target_ids[-1] = own[-1:] - 1, response[-1:]",
        tests=_SCALAR_TEST,
    ),
    Mutant(  # the fine-tuning's adapters are lost at the start
        trap="7",
        file=_START,
        old="        policy = Policy(merge_lora(policy.model).model)",
        new="        policy = Policy(policy.model.unload())",
        tests=f"{_CHAINS}::test_the_reference_is_the_fine_tuned_model",
    ),
    Mutant(  # a checkpoint's adapters go onto the model of the hub instead of the fine-tuned one
        trap="7",
        file=_START,
        old='    start = (getattr(task, "sft_experiment_dir", None), getattr(task, "sft_model_name", "final"))',
        new='    start = (None, "final")',
        tests=f"{_CHAINS}::test_every_form_of_a_chained_run_is_the_same_model",
    ),
    Mutant(  # adapters that name a model without the fine-tuning that they were trained on
        trap="7",
        file=_LORA,
        old='    merged.name_or_path = merged.config._name_or_path = ""\n',
        new="",
        tests=f"{_CHAINS}::test_every_form_of_a_chained_run_is_the_same_model",
    ),
    Mutant(  # the reference of other weights is taken
        trap="7",
        file=_DPO,
        old='key = f"{weights_digest(policy)}-{cfg.fabric.precision}-{packed}"',
        new='key = f"{cfg.fabric.precision}-{packed}"',
        tests=f"{_E2E_DPO}::test_the_reference_is_computed_once_and_is_that_of_these_weights",
    ),
    Mutant(  # the reference is computed with dropout
        trap="7",
        file=_REFERENCE,
        old="    with isolated_rng(), gathered(module), eval_mode(module), torch.no_grad():\n        for part, micro",
        new="    module.train()\n    with isolated_rng(), torch.no_grad():\n        for part, micro",
        tests="tests/unit/task/test_reference.py",
    ),
    Mutant(  # a response's mean, not its sum
        trap="11",
        file=_DPO,
        old="    losses_P = pair_losses(task, sums_S,",
        new="    losses_P = pair_losses(task, sums_S / lengths_S,",
        tests=f"{_E2E_DPO}::test_the_first_loss_is_that_of_no_difference_and_then_it_falls",
    ),
    Mutant(  # SimPO and IPO by sums
        trap="11",
        file=_DPO_LOSS,
        old="    return (h_w_P / length_w_P - h_l_P / length_l_P - 1.0 / (2.0 * beta)).square()",
        new="    return (h_w_P - h_l_P - 1.0 / (2.0 * beta)).square()",
        tests=_UNIT_DPO,
    ),
    Mutant(  # label smoothing ignored
        trap="dpo",
        file=_DPO_LOSS,
        old="    return -(1.0 - label_smoothing) * logsigmoid(d_P) - label_smoothing * logsigmoid(-d_P)",
        new="    return -logsigmoid(d_P)",
        tests=_UNIT_DPO,
    ),
    Mutant(  # adapters are saved without the head
        trap="19",
        file=_LORA,
        old='"CAUSAL_LM" if head is None else "SEQ_CLS",\n        modules_to_save=None if head is None else [head],',
        new='"CAUSAL_LM",',
        tests=f"{_E2E_RM}::test_plain_transformers_gives_our_scores_in_a_fresh_process[llama-LORA]",
    ),
    Mutant(  # the offset is forgotten when adapters are loaded
        trap="19",
        file=_REWARD,
        old="        reward.offset = offset_of(adapter)\n",
        new="",
        tests=f"{_CHAINS}::test_an_offset_comes_back_with_the_adapters",
    ),
    Mutant(  # EOS is padding
        trap="22",
        file=_SCALAR,
        old="    vocabulary = tokenizer.get_vocab()\n    taken",
        new="    return str(tokenizer.eos_token)\n    taken",
        tests=_SCALAR_TEST,
    ),
    Mutant(  # the head of OPT-350m has the hidden width
        trap="22",
        file=_SCALAR,
        old="    new = nn.Linear(head.in_features, 1,",
        new="    new = nn.Linear(causal_lm.config.hidden_size, 1,",
        tests=_SCALAR_TEST,
    ),
    Mutant(  # the shorter response's padding counts
        trap="20 reward",
        file=_RM_LOSS,
        old="_between(losses_PL, first_P, shorter_P)",
        new="_between(losses_PL, first_P, torch.maximum(chosen.lengths_S, rejected.lengths_S))",
        tests=_UNIT_RM,
    ),
    Mutant(  # one row's first difference masks all rows
        trap="20 reward",
        file=_RM_LOSS,
        old="inside_PL & (place_L >= first_P[:, None])",
        new="inside_PL & (place_L >= first_P.max())",
        tests=_UNIT_RM,
    ),
    Mutant(  # the better and the worse response change places
        trap="20 reward",
        file=_RM_LOSS,
        old="    return -logsigmoid(chosen - rejected - margin)",
        new="    return -logsigmoid(chosen - rejected + margin)",
        tests=_UNIT_RM,
    ),
]
