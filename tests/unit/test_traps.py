"""Map each known trap of training from preferences to the tests that fail when the bug is introduced.

RLHF code is rarely loud when it is wrong: it trains, and the numbers are off. A test named here may be replaced, but
only by one that fails for the same bug.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TRAPS = {
    "1 masks made by comparing ids with the pad id hide a real end token": """
        tests/unit/data/test_collate.py::test_pad_may_be_eos
        tests/unit/agent/test_batching.py::test_log_probabilities_equal_those_of_rows_alone""",
    "2 padding shifts positions, log-probabilities or scores": """
        tests/unit/data/test_collate.py::test_padding_shifts_no_position
        tests/unit/data/test_collate.py::test_packed_two_responses_share_their_prompt
        tests/unit/agent/test_batching.py::test_what_is_written_is_that_of_an_argmax_loop
        tests/parity/test_packed_equals_padded.py::test_packed_equals_padded
        tests/parity/test_packed_equals_padded.py::test_a_score_is_the_same_in_any_company""",
    "3 two begin tokens": "tests/unit/data/test_tokenize.py::test_bos_is_that_of_the_tokenizer_or_of_the_chat_template",
    "4 the reward or the action mask is one token off": """
        tests/unit/loss/test_advantage.py::test_token_rewards_by_hand
        tests/unit/model/test_scalar.py::test_plain_transformers_gives_the_same_scores
        tests/unit/rollout/test_collect_steps.py::test_a_reward_model_scores_the_last_token""",
    "5 log-probabilities at another temperature than the sampler's": """
        tests/unit/task/test_ppo_step.py::test_an_update_is_the_slow_one
        tests/unit/rollout/test_collect_steps.py::test_each_token_has_the_log_probability_that_a_plain_forward_gives
        tests/e2e/test_online.py::test_the_first_update_begins_at_ratio_one""",
    "6 dropout differs between two passes that are compared": """
        tests/parity/test_packed_equals_padded.py::test_no_dropout_anywhere_when_disabled
        tests/unit/config/test_training_checks.py::test_it_is_refused_with_the_fix
        tests/unit/rollout/test_generate.py::test_training_flags_and_settings_are_restored""",
    "7 the reference is not the initial policy": """
        tests/unit/model/test_lora.py::test_new_adapters_change_nothing
        tests/unit/agent/test_policy.py::test_without_adapters_it_is_the_base_bit_for_bit
        tests/unit/agent/test_policy.py::test_an_error_leaves_nothing_switched
        tests/e2e/test_preferences.py::test_the_first_loss_is_that_of_no_difference_and_then_it_falls
        tests/e2e/test_chains.py::test_the_reference_is_the_fine_tuned_model""",
    "8 accumulation steps too early or keeps gradients": """
        tests/unit/engine/test_step.py::test_any_cut_is_one_batch
        tests/unit/engine/test_step.py::test_every_call_is_one_optimizer_step
        tests/unit/data/test_sampler.py::test_each_epoch_is_a_permutation_in_ceil_steps""",
    "9 a mean of means": """
        tests/unit/engine/test_step.py::test_any_cut_is_one_batch
        tests/unit/loss/test_ppo.py::test_a_weight_does_not_depend_on_the_company
        tests/distributed/test_update.py::test_two_processes_equal_one""",
    "10 the forward pass outside no_sync": "tests/distributed/test_update.py::test_one_gradient_sync_per_step",
    "11 per sequence or per token": """
        tests/unit/loss/test_ppo.py::test_the_loss_of_a_step_by_hand
        tests/unit/loss/test_ppo.py::test_a_whole_response_has_one_ratio
        tests/e2e/test_preferences.py::test_the_first_loss_is_that_of_no_difference_and_then_it_falls""",
    "12 log-probabilities and sums in half precision": """
        tests/unit/model/test_lm_head.py::test_half_precision_logits_are_scored_in_float32
        tests/unit/agent/test_policy.py::test_a_half_precision_model_is_scored_in_float32
        tests/unit/engine/test_step.py::test_sums_are_kept_beyond_float32""",
    "13 tokens merge over the border of prompt and response": """
        tests/unit/data/test_tokenize.py::test_prompt_ids_are_always_a_prefix_that_both_responses_share""",
    "14 the KL estimate has the wrong sign, or a gradient that is not its own": """
        tests/unit/loss/test_advantage.py::test_k3_is_never_negative_and_both_are_zero_for_identical_policies
        tests/unit/loss/test_advantage.py::test_the_mean_of_the_estimates_is_the_kl
        tests/unit/loss/test_advantage.py::test_k3_as_a_loss_has_its_own_gradient""",
    "15 a response that was cut counts as ended": """
        tests/unit/rollout/test_sampler.py::test_eos_is_part_of_the_response_and_ends_it
        tests/unit/rollout/test_generate.py::test_it_stops_at_eos
        tests/unit/reward/test_functions.py::test_each_penalty""",
    "16 advantages: bootstrapping, padding": """
        tests/unit/loss/test_advantage.py::test_gae_by_hand
        tests/unit/loss/test_advantage.py::test_gae_is_the_definition
        tests/unit/task/test_ppo_step.py::test_an_update_is_the_slow_one""",
    "17 whitening with the moments of a row, a rank or the padding": """
        tests/unit/loss/test_advantage.py::test_whitening_is_the_definition
        tests/unit/loss/test_advantage.py::test_whitening_of_one_token_and_of_none
        tests/distributed/test_tasks.py::test_two_processes_equal_one""",
    "18 epochs, resumed runs and ranks share random numbers": """
        tests/unit/data/test_sampler.py::test_epochs_and_seeds_differ_and_repeat
        tests/unit/engine/test_ranks.py::test_two_ranks_resume_bit_for_bit
        tests/distributed/test_sft.py::test_processes_begin_alike_and_drop_differently""",
    "19 the head of a reward model is lost on the way to disk": """
        tests/e2e/test_rm.py::test_plain_transformers_gives_our_scores
        tests/e2e/test_chains.py::test_an_offset_comes_back_with_the_adapters""",
    "20 mistakes of the code of 2023": """
        tests/unit/loss/test_reward.py::test_random_pairs_equal_a_loop_and_what_is_not_compared_has_no_gradient
        tests/unit/data/test_prepare.py::test_every_row_is_kept_or_counted
        tests/unit/data/test_tokenize.py::test_overflow_keeps_bos_and_the_prompts_end
        tests/unit/security/test_redaction.py::test_keys_are_hidden_wherever_they_are
        tests/unit/loss/test_advantage.py::test_the_kl_coefficient_follows_the_kl
        tests/unit/task/test_evaluation_figures.py::test_it_needs_no_network_and_leaves_no_file""",
    "21 several adapters on one base": """
        tests/unit/agent/test_policy.py::test_each_learns_by_its_own_adapter
        tests/unit/agent/test_policy.py::test_gradient_checkpointing_computes_with_the_same_adapter
        tests/unit/agent/test_policy.py::test_a_reward_models_adapters_fit_beside_the_policys""",
    "22 a saved reward model is read at another token by other programs": """
        tests/unit/model/test_scalar.py::test_plain_transformers_gives_the_same_scores
        tests/unit/model/test_scalar.py::test_padding_is_a_token_without_another_role""",
    "23 missing tensors are random": """
        tests/unit/model/test_account.py::test_a_missing_tensor_is_named
        tests/unit/model/test_lora.py::test_every_tensor_of_an_adapter_is_accounted_for
        tests/unit/task/test_weight_checks.py::test_a_hole_ends_training_before_anything_is_made""",
    "24 a check is missing in a sibling path": """
        tests/unit/model/test_lora.py::test_a_merge_that_computes_something_else_is_an_error
        tests/e2e/test_export.py::test_a_wrong_merge_is_refused_with_figures
        tests/unit/config/test_shell.py::test_no_command_is_put_together_elsewhere
        tests/unit/agent/test_batching.py::test_log_probabilities_equal_those_of_rows_alone""",
    "25 one end token where a model has several": """
        tests/unit/utils/test_end_tokens.py::test_engines_end_at_the_first_of_the_set
        tests/unit/utils/test_end_tokens.py::test_generate_and_stream_end_there_too
        tests/unit/utils/test_end_tokens.py::test_saved_folders_list_all_of_them""",
    "26 a response is encoded as a text of its own": """
        tests/unit/data/test_tokenize.py::test_prompt_and_response_decode_to_their_text
        tests/unit/data/test_tokenize.py::test_a_response_has_the_ids_behind_its_prompt""",
    "27 the split of a row depends on its rendering": """
        tests/unit/data/test_prepare.py::test_rows_and_splits_do_not_depend_on_the_day
        tests/unit/data/test_prepare.py::test_conversations_are_identified_before_the_template""",
    "28 keys and columns are ignored without a word": """
        tests/unit/data/test_conversation.py::test_what_changes_the_meaning_and_cannot_be_read_is_refused
        tests/unit/data/test_conversation.py::test_what_is_not_used_is_reported
        tests/unit/data/test_layout.py::test_columns_that_are_not_read_are_counted""",
    "29 arguments of reward functions are bound by place": """
        tests/unit/reward/test_signature.py::test_arguments_are_bound_by_name""",
    "30 truncation removes the prompt": """
        tests/unit/data/test_tokenize.py::test_a_pair_keeps_its_prompt_and_the_shorter_response_whole
        tests/unit/data/test_tokenize.py::test_overflow_keeps_bos_and_the_prompts_end""",
    "31 ids that the tokenizer lacks are sampled": """
        tests/unit/utils/test_vocabulary.py::test_engines_never_sample_them
        tests/unit/utils/test_vocabulary.py::test_generate_and_stream_never_write_them
        tests/unit/utils/test_vocabulary.py::test_the_policy_learns_from_the_distribution_that_is_sampled""",
    "33 the world of a launcher, or a failed job of a sweep, is ignored": """
        tests/unit/cli/test_two_processes.py::test_processes_of_a_launcher_train_together
        tests/unit/utils/test_launchers.py::test_the_fourth_process_of_two_machines_with_two_each
        tests/unit/cli/test_run.py::test_a_failed_job_does_not_end_the_sweep_but_its_exit_code_counts""",
}


@cache
def _functions(file: Path) -> set[str]:
    assert file.is_file(), f"{file} is gone: name what tests its trap now"
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_tests(trap: str) -> None:
    for test in TRAPS[trap].split():
        file, _, name = test.partition("::")
        assert name in _functions(ROOT / file), f"{test} is gone: name what tests trap {trap} now"
