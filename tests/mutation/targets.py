"""The modules or functions that are mutated, with the tests that must notice, and the mutants that change nothing."""

TARGETS: dict[str, tuple[str, ...]] = {
    "sheeprlhf.loss.advantage": ("tests/unit/loss/test_advantage.py",),
    "sheeprlhf.loss.dpo": ("tests/unit/loss/test_dpo.py",),
    "sheeprlhf.loss.ilql": ("tests/unit/task/test_ilql.py",),
    "sheeprlhf.loss.ppo": ("tests/unit/loss/test_ppo.py", "tests/unit/task/test_group_losses.py"),
    "sheeprlhf.loss.reward": ("tests/unit/loss/test_reward.py",),
    "sheeprlhf.loss.sft": ("tests/unit/loss/test_sft.py",),
    "sheeprlhf.engine.step": ("tests/unit/engine/test_step.py", "tests/distributed/test_update.py"),
    "sheeprlhf.engine.optim": ("tests/unit/engine/test_optim.py",),
    "sheeprlhf.data.example": ("tests/unit/data/test_collate.py",),
    "sheeprlhf.data.rows:labelled": ("tests/unit/data/test_labels.py",),
    "sheeprlhf.data.rows:is_desirable": ("tests/unit/data/test_labels.py",),
    "sheeprlhf.data.store:MismatchedSplit": ("tests/unit/data/test_mismatch.py",),
    "sheeprlhf.data.store:mismatched_rows": ("tests/unit/data/test_mismatch.py",),
    "sheeprlhf.data.sampler": ("tests/unit/data/test_sampler.py",),
    "sheeprlhf.data.tokenize": ("tests/unit/data/test_tokenize.py", "tests/unit/data/test_prompts.py"),
    "sheeprlhf.agent.batches": ("tests/unit/agent/test_batches.py", "tests/unit/agent/test_policy.py"),
    "sheeprlhf.model.lm_head": (
        "tests/unit/model/test_lm_head.py",
        "tests/unit/agent/test_policy.py",
    ),
    "sheeprlhf.model.attention": ("tests/unit/model/test_attention.py", "tests/unit/rollout/test_sampler.py"),
    "sheeprlhf.rollout.sampler": ("tests/unit/rollout/test_sampler.py", "tests/unit/rollout/test_generate.py"),
    "sheeprlhf.rollout.engines": ("tests/unit/rollout/test_sampler.py", "tests/unit/rollout/test_engines.py"),
    "sheeprlhf.agent.policy": ("tests/unit/agent/test_policy.py", "tests/parity/test_packed_equals_padded.py"),
    "sheeprlhf.reward.functions": ("tests/unit/reward/test_functions.py",),
    "sheeprlhf.reward.score": ("tests/unit/reward/test_score.py",),
    "sheeprlhf.task.loop": ("tests/unit/task/test_loop.py",),
    "sheeprlhf.task.train.distill:distill_loss": ("tests/unit/task/test_group_losses.py",),
    "sheeprlhf.task.train.dpo:dpo_loss": ("tests/unit/task/test_loss_metrics.py", "tests/parity/test_trl.py"),
    "sheeprlhf.task.train.grpo": ("tests/unit/task/test_group_losses.py",),
    "sheeprlhf.task.train.ilql:ilql_loss": ("tests/unit/task/test_ilql.py",),
    "sheeprlhf.task.train.kto": ("tests/unit/task/test_kto.py",),
    "sheeprlhf.task.train.online_dpo": ("tests/unit/task/test_group_losses.py",),
    "sheeprlhf.task.train.prm:prm_loss": ("tests/unit/task/test_loss_metrics.py", "tests/unit/task/test_prm.py"),
    "sheeprlhf.task.train.reinforce_pp": ("tests/unit/task/test_group_losses.py",),
    "sheeprlhf.task.train.ppo": ("tests/unit/task/test_ppo_step.py",),
    "sheeprlhf.task.train.rloo": ("tests/unit/task/test_group_losses.py",),
    "sheeprlhf.task.train.rm:rm_loss": ("tests/unit/task/test_loss_metrics.py", "tests/parity/test_trl.py"),
    "sheeprlhf.task.train.sft:sft_loss": ("tests/unit/task/test_loss_metrics.py", "tests/unit/loss/test_sft.py"),
}

WITHOUT_SURVIVORS = [name for name in TARGETS if name.startswith("sheeprlhf.loss.")] + [
    "sheeprlhf.data.sampler:StepPlan",
    "sheeprlhf.data.sampler:RolloutPlan",
    "sheeprlhf.data.sampler:cut_micro_batches",
    "sheeprlhf.task.loop:Iteration",
    "sheeprlhf.task.train.distill:distill_loss",
    "sheeprlhf.task.train.ilql:ilql_loss",
    "sheeprlhf.task.train.prm:prm_loss",
    "sheeprlhf.task.train.reinforce_pp:reinforce_pp_loss",
    "sheeprlhf.task.train.reinforce_pp:with_advantages",
    "sheeprlhf.task.train.rm:rm_loss",
    "sheeprlhf.task.train.sft:sft_loss",
]

EQUIVALENT: dict[str, dict[str, tuple[str, ...]]] = {  # of a function: the reason, and the changes
    "sheeprlhf.loss.advantage.by_position": {
        "any type of integers will do": (
            "torch.tensor(lengths, dtype=torch.long, device=values_N.device)"
            " -> torch.tensor(lengths, device=values_N.device)",
        )
    },
    "sheeprlhf.loss.advantage.gae": {
        "a column is read before it is written": ("torch.zeros_like(deltas_ST) -> deltas_ST",)
    },
    "sheeprlhf.loss.advantage.group_advantages": {
        "float32 minus float64 is float64": ("scores_PG.double() -> scores_PG",)
    },
    "sheeprlhf.loss.dpo._log_odds": {
        "equal on the border": tuple(f"m > -math.log(2.0) -> m >= -math.log(2.0){n}" for n in ("", " #2", " #3")),
        "the first branch has a finite gradient everywhere": (
            "torch.where(m > -math.log(2.0), m, -1.0) -> m",
            "math.log(2.0) -> 2.0",
            "2.0 -> 3.0",
        ),
        "the gradient of a constant is dropped": ("-1.0 -> 1.0", "1.0 -> 2.0", "-1.0 -> 1.0 #2", "1.0 -> 2.0 #2"),
    },
    "sheeprlhf.loss.dpo.aot_partners": {
        "equal values may change places": ("values_P.argsort(stable=True) -> values_P.argsort()", "True -> False"),
    },
    "sheeprlhf.task.train.reinforce_pp.reinforce_pp_loss": {
        "k2 is symmetric": (
            "kl_estimates(logprobs_N, sampled['reference'], 'k2')"
            " -> kl_estimates(sampled['reference'], logprobs_N, 'k2')",
        ),
    },
    "sheeprlhf.task.train.reinforce_pp.with_advantages": {
        "float64 is rounded to float32 when it is stored": ("scores_PG.float() -> scores_PG",)
    },
    "sheeprlhf.loss.ppo.explained_variance": {
        "float64 minus float32 is float64": ("returns.double() -> returns", "values.double() -> values")
    },
    "sheeprlhf.loss.ppo.value_losses": {
        "the middle one of three": (
            "torch.clamp(values_N, old_N - clip, old_N + clip) -> torch.clamp(old_N - clip, values_N, old_N + clip)",
        )
    },
    "sheeprlhf.loss.reward.plackett_luce": {
        "the gradients of the largest score cancel": (
            "scores_S.detach() -> scores_S",
            "scores_S.detach() -> scores_S #2",
        )
    },
    "sheeprlhf.loss.reward.reward_loss": {
        "both are subtracted": (
            "bradley_terry(last_scores(chosen), last_scores(rejected), margin_P)"
            " -> bradley_terry(last_scores(chosen), margin_P, last_scores(rejected))",
            "bradley_terry(chosen_P, rejected_P, margin_P) -> bradley_terry(chosen_P, margin_P, rejected_P)",
            "bradley_terry(chosen.values_SL, rejected.values_SL, margin_P[:, None])"
            " -> bradley_terry(chosen.values_SL, margin_P[:, None], rejected.values_SL)",
        ),
        "the first difference is at the same place in both": (
            "_first_difference(chosen, rejected, shorter_P) -> _first_difference(rejected, chosen, shorter_P)",
        ),
    },
    "sheeprlhf.loss.ilql.expectile_losses": {"no difference, no loss": ("differences_N >= 0 -> differences_N > 0",)},
    "sheeprlhf.loss.ilql.q_losses": {
        "values and rewards behind a response are 0": (
            "torch.arange(width, device=values_N.device) < lengths_S[:, None]"
            " -> torch.arange(width, device=values_N.device) <= lengths_S[:, None]",
        ),
        "the size saves a wait for the device alone": (
            "shift_S.repeat_interleave(lengths_S, output_size=len(values_N)) -> shift_S.repeat_interleave(lengths_S)",
        ),
    },
    "sheeprlhf.task.train.rm.rm_loss": {
        "the square of a sum": ("centering(chosen_P, rejected_P) -> centering(rejected_P, chosen_P)",),
        "one more place of padding": ("1 -> 2",),
    },
    "sheeprlhf.loss.sft.expert_counts": {
        "logits have two dimensions": ("-1 -> 1", "-1 -> 1 #2"),
        "the last is topk's own choice": ("logits_TE.topk(top_k, dim=-1) -> logits_TE.topk(top_k)",),
    },
    "sheeprlhf.loss.sft.probability_sums": {"logits have two dimensions": ("-1 -> 1",)},
    "sheeprlhf.data.sampler.StepPlan.rows_until": {
        "all steps of an epoch read all rows": (
            "num_steps - self.first_step >= self.steps_per_epoch()"
            " -> num_steps - self.first_step > self.steps_per_epoch()",
        ),
        "np.unique joins what is of one length": (
            "np.concatenate([self.rows_of_step(step) for step in range(self.first_step, num_steps)])"
            " -> [self.rows_of_step(step) for step in range(self.first_step, num_steps)]",
        ),
    },
    "sheeprlhf.data.sampler.cut_micro_batches": {
        "of arrays, and of types that numpy takes": (
            "np.asarray(rows, dtype=np.int64) -> np.asarray(rows)",
            "np.asarray(lengths) -> lengths",
            "tokens.astype(np.int64) -> tokens",
            "indices[by_length].tolist() -> indices[by_length]",
            "tokens[by_length].tolist() -> tokens[by_length]",
        ),
        "the loads differ by the same number": ("0 -> 1",),
        "the first row begins a batch anyway": ("0 -> 1 #2",),
    },
    "sheeprlhf.engine.step._passes": {
        "without items nothing else is read": (
            "_StepSums(micro_batches, totals, sums, [], 0) -> _StepSums(totals, micro_batches, sums, [], 0)",
            "_StepSums(micro_batches, totals, sums, [], 0) -> _StepSums(micro_batches, sums, totals, [], 0)",
            "_StepSums(micro_batches, totals, sums, [], 0) -> _StepSums(micro_batches, totals, [], sums, 0)",
        ),
        "the backward pass has freed what the graph holds": ("output.total.detach() -> output.total",),
        "forward_of_zero reads no input": ("torch.zeros((), device=fabric.device) -> ()",),
    },
    "sheeprlhf.engine.step._accumulate": {
        "the backward pass has freed what the graph holds": ("output.total.detach() -> output.total",)
    },
    "sheeprlhf.engine.step._reduce": {
        "a sum over one rank": ("fabric.world_size > 1 -> fabric.world_size >= 1",),
        "float32 beside float64 becomes float64": ("same_on_all.double() -> same_on_all",),
    },
    "sheeprlhf.engine.step._non_finite_message": {"isfinite takes a tensor of one number": ("total.item() -> total",)},
}
