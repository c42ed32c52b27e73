"""The modules that are mutated, with the tests that must notice, and the mutants that change nothing."""

TARGETS: dict[str, tuple[str, ...]] = {
    "sheeprlhf.loss.advantage": ("tests/unit/loss/test_advantage.py",),
    "sheeprlhf.loss.dpo": ("tests/unit/loss/test_dpo.py",),
    "sheeprlhf.loss.ppo": ("tests/unit/loss/test_ppo.py",),
    "sheeprlhf.loss.reward": ("tests/unit/loss/test_reward.py",),
    "sheeprlhf.loss.sft": ("tests/unit/loss/test_sft.py",),
    "sheeprlhf.engine.step": ("tests/unit/engine/test_step.py",),
    "sheeprlhf.engine.optim": ("tests/unit/engine/test_optim.py",),
    "sheeprlhf.data.collate": ("tests/unit/data/test_collate.py",),
    "sheeprlhf.data.labels": ("tests/unit/data/test_labels.py",),
    "sheeprlhf.data.mismatch": ("tests/unit/data/test_mismatch.py",),
    "sheeprlhf.data.sampler": ("tests/unit/data/test_sampler.py",),
    "sheeprlhf.data.tokenize": ("tests/unit/data/test_tokenize.py", "tests/unit/data/test_prompts.py"),
    "sheeprlhf.agent.batches": ("tests/unit/agent/test_batches.py",),
    "sheeprlhf.agent.ema": ("tests/unit/agent/test_ema.py",),
    "sheeprlhf.model.lm_head": ("tests/unit/model/test_lm_head.py", "tests/unit/agent/test_policy.py"),
    "sheeprlhf.model.attention": ("tests/unit/model/test_attention.py",),
    "sheeprlhf.model.cache": ("tests/unit/rollout/test_sampler.py",),
    "sheeprlhf.rollout.decoders": ("tests/unit/rollout/test_sampler.py",),
    "sheeprlhf.rollout.sampler": ("tests/unit/rollout/test_sampler.py",),
    "sheeprlhf.rollout.stop": ("tests/unit/rollout/test_stop.py",),
    "sheeprlhf.agent.batching": ("tests/unit/agent/test_policy.py",),
    "sheeprlhf.agent.policy": ("tests/unit/agent/test_policy.py", "tests/parity/test_packed_equals_padded.py"),
    "sheeprlhf.reward.functions": ("tests/unit/reward/test_functions.py",),
    "sheeprlhf.reward.score": ("tests/unit/reward/test_score.py",),
    "sheeprlhf.task.train.grpo": ("tests/unit/task/test_group_losses.py",),
    "sheeprlhf.task.train.kto": ("tests/unit/task/test_kto.py",),
    "sheeprlhf.task.train.online_dpo": ("tests/unit/task/test_group_losses.py",),
    "sheeprlhf.task.train.ppo": ("tests/unit/task/test_ppo_step.py",),
    "sheeprlhf.task.train.rloo": ("tests/unit/task/test_group_losses.py",),
}

_ORDER = "subtracted one after the other"
_PROMOTED = "float64 minus float32 is float64"

EQUIVALENT: dict[str, str] = {  # and why
    "sheeprlhf.loss.ppo.value_losses: torch.clamp(values_N, old_N - clip, old_N + clip) "
    "-> torch.clamp(old_N - clip, values_N, old_N + clip)": "the middle one of three either way",
    "sheeprlhf.loss.ppo.explained_variance: returns.double() -> returns": _PROMOTED,
    "sheeprlhf.loss.ppo.explained_variance: values.double() -> values": _PROMOTED,
    "sheeprlhf.loss.advantage.group_advantages: scores_PG.double() -> scores_PG": _PROMOTED,
    "sheeprlhf.loss.advantage.gae: torch.zeros_like(deltas_ST) -> deltas_ST": "a column is read before it is written",
    "sheeprlhf.loss.advantage.by_position: torch.tensor(lengths, dtype=torch.long, device=values_N.device) "
    "-> torch.tensor(lengths, device=values_N.device)": "the type of integers, and of no value any will do",
    "sheeprlhf.loss.reward.reward_loss: bradley_terry(last_scores(chosen), last_scores(rejected), margin_P) "
    "-> bradley_terry(last_scores(chosen), margin_P, last_scores(rejected))": _ORDER,
    "sheeprlhf.loss.reward.reward_loss: bradley_terry(chosen_P, rejected_P, margin_P) "
    "-> bradley_terry(chosen_P, margin_P, rejected_P)": _ORDER,
    "sheeprlhf.loss.reward.reward_loss: bradley_terry(chosen.values_SL, rejected.values_SL, margin_P[:, None]) "
    "-> bradley_terry(chosen.values_SL, margin_P[:, None], rejected.values_SL)": _ORDER,
    "sheeprlhf.loss.reward.reward_loss: _first_difference(chosen, rejected, shorter_P) "
    "-> _first_difference(rejected, chosen, shorter_P)": "of either it is the same place",
}
