"""Mistakes in PPO, GRPO, RLOO and their models that their tests notice."""

from tests.mutants.mutant import Mutant

_PPO = "sheeprlhf/task/train/ppo.py"
_STEP = "tests/unit/task/test_ppo_step.py"
_SHARED = "tests/unit/agent/test_shared.py"
_ROLLOUTS = "tests/unit/task/test_rollouts.py"
_LORA = "sheeprlhf/model/lora.py"
_COLLECT = "sheeprlhf/task/collect.py"
_AVERAGE = "sheeprlhf/task/average.py"

MUTANTS = [
    Mutant(
        trap="ppo: the dataset's own texts have another weight",
        file=_PPO,
        old="ptx_loss, weight=task.ptx_coeff)",
        new="ptx_loss, weight=1.0)",
        tests="tests/e2e/test_online.py::test_the_weight_of_the_datasets_texts_is_read",
    ),
    Mutant(
        trap="ppo: the dataset's own texts have another weight",
        file="sheeprlhf/engine/step.py",
        old="scale = weight * fabric.world_size / num_items",
        new="scale = fabric.world_size / num_items",
        tests=_STEP,
    ),
    Mutant(
        trap="ppo: the values of a shared trunk teach it nothing",
        file=_PPO,
        old="        losses_N = losses_N + task.vf_coeff * errors_N\n",
        new="",
        tests=_STEP,
    ),
    Mutant(
        trap="ppo: the values of a shared trunk teach it nothing",
        file="sheeprlhf/agent/policy.py",
        old="head_scores(hidden_RC, self.value_head)",
        new="head_scores(hidden_RC.detach(), self.value_head)",
        tests=_STEP,
    ),
    Mutant(
        trap="ppo: the average is of the wrong weights",
        file=_AVERAGE,
        old="self._theirs, 1.0 - self._decay)",
        new="self._theirs, self._decay)",
        tests="tests/unit/task/test_average.py",
    ),
    Mutant(
        trap="ppo: the average is of the wrong weights",
        file=_AVERAGE,
        old="        finally:\n            self._exchange()\n",
        new="        finally:\n            pass\n",
        tests="tests/unit/task/test_average.py",
    ),
    Mutant(
        trap="ppo: the average is of the wrong weights",
        file=_PPO,
        old="        with as_shown():\n            finish_run(",
        new="        if True:\n            finish_run(",
        tests="tests/e2e/test_online.py::test_the_average_is_what_a_run_leaves",
    ),
    Mutant(
        trap="4: the reward is read from another place",
        file=_COLLECT,
        old='self._model_scores = self.scores_of(self._reward, rollout, "scoring", at_end=True).tolist()\n',
        new='self._model_scores = self.scores_of(self._reward, rollout, "scoring").tolist()\n',
        tests=f"{_ROLLOUTS}::test_a_reward_model_scores_the_last_token",
    ),
    Mutant(
        trap="5: another temperature than the sampler's",
        file=_PPO,
        old="    found = policy(batch, temperature=temperature)\n",
        new="    found = policy(batch)\n",
        tests=_STEP,
    ),
    Mutant(
        trap="5: another temperature than the sampler's",
        file=_COLLECT,
        old="            return module(batch, temperature=temperature).target_N\n",
        new="            return module(batch).target_N\n",
        tests=f"{_ROLLOUTS}::test_each_token_has_the_log_probability_that_a_plain_forward_gives",
    ),
    Mutant(
        trap="5: another temperature than the sampler's",
        file="sheeprlhf/model/head.py",
        old="        logits_RV = logits_RV.div_(temperature)\n",
        new="        logits_RV = logits_RV.mul_(temperature)\n",
        tests=_STEP,
    ),
    Mutant(
        trap="6: dropout between two passes that are compared",
        file="sheeprlhf/structure/task_checks.py",
        old="    if not model.disable_dropout:\n",
        new="    if False:\n",
        tests="tests/unit/structure/test_online_checks.py",
    ),
    Mutant(
        trap="7: the reference has the adapters on",
        file="sheeprlhf/agent/reference.py",
        old="        with adapters_off(policy.model):\n            return",
        new="        if True:\n            return",
        tests=f"{_SHARED}::test_without_adapters_it_is_the_base_bit_for_bit",
    ),
    Mutant(
        trap="14: the reference moves with the policy",
        file="sheeprlhf/agent/reference.py",
        old="    reference = copy.deepcopy(policy).eval()\n",
        new="    reference = policy\n",
        tests="tests/e2e/test_online.py",
    ),
    Mutant(
        trap="16: a cut response is taken as ended",
        file=_PPO,
        old="gae(rewards_ST, values_ST, mask_ST, last_values_S=last_values_S, **discounts)",
        new="gae(rewards_ST, values_ST, mask_ST, last_values_S=None, **discounts)",
        tests=_STEP,
    ),
    Mutant(
        trap="16: returns are those of whitened advantages",
        file=_PPO,
        old="returns=returns_ST[mask_ST]",
        new="returns=(advantages_ST + values_ST)[mask_ST]",
        tests=_STEP,
    ),
    Mutant(
        trap="17: whitening",
        file=_PPO,
        old="        rewards_ST = whiten(rewards_ST, mask_ST, shift_mean=False)\n",
        new="        rewards_ST = whiten(rewards_ST, mask_ST)\n",
        tests=_STEP,
    ),
    Mutant(
        trap="21: an adapter that is not in use gets gradients",
        file=_LORA,
        old="        model.requires_grad_(False)\n        for weight in trains:\n",
        new="        for weight in trains:\n",
        tests=_SHARED,
    ),
    Mutant(
        trap="21: switching adapters changes what trains",
        file=_LORA,
        old="    finally:\n        for weight, flag in flags:\n            weight.requires_grad_(flag)\n",
        new="    finally:\n        pass\n",
        tests=_SHARED,
    ),
    Mutant(
        trap="21: switching adapters changes what trains",
        file=_LORA,
        old="        result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)\n",
        new="        result: Any = set_peft_model_state_dict(model, {}, adapter_name=name)\n",
        tests=f"{_SHARED}::test_a_reward_models_adapters_fit_beside_the_policys",
    ),
    Mutant(
        trap="2023: actor and critic learning rates are not read",
        file="sheeprlhf/engine/optim.py",
        old="[group for parameters, lr in learners for group in _groups(cfg, parameters, lr)]",
        new="[group for parameters, _ in learners for group in _groups(cfg, parameters, learners[0][1])]",
        tests=_STEP,
    ),
    Mutant(
        trap="2023: the adaptive KL coefficient is not carried",
        file="sheeprlhf/task/turns.py",
        old="        state.extra = turn.carried | self.collect.state()\n",
        new="        state.extra = self.collect.state()\n",
        tests="tests/faults/test_resume.py::test_resume_at_chosen_steps_is_bit_identical[ppo]",
    ),
    Mutant(
        trap="running moments of rewards are not carried",
        file="sheeprlhf/task/online.py",
        old="    collect.restore(state.extra)\n",
        new="",
        tests="tests/faults/test_resume.py::test_resume_at_chosen_steps_is_bit_identical[ppo]",
    ),
    Mutant(
        trap="running moments of rewards are not carried",
        file=_COLLECT,
        old="        return total if validates else self._scorer.shape(total, self.texts)\n",
        new="        return self._scorer.shape(total, self.texts)\n",
        tests=f"{_ROLLOUTS}::test_a_validation_leaves_no_trace_in_the_running_moments",
    ),
    Mutant(
        trap="every pass over a rollout has one order",
        file="sheeprlhf/task/rollouts.py",
        old="    return np.random.default_rng([seed, number]).random(shape)\n",
        new="    return np.random.default_rng([seed]).random(shape)\n",
        tests=f"{_ROLLOUTS}::test_what_is_sampled_depends_on_seed_and_number_alone",
    ),
    Mutant(
        trap="rloo: the KL is no part of the reward",
        file="sheeprlhf/task/train/rloo.py",
        old="torch.from_numpy(scores_PG) - kl_coeff * kl_ST",
        new="torch.from_numpy(scores_PG) + kl_coeff * kl_ST",
        tests="tests/unit/task/test_group_losses.py",
    ),
    Mutant(
        trap="online dpo: the pair is the wrong way round",
        file="sheeprlhf/task/train/online_dpo.py",
        old="pair = (int(scores.argmax()), int(scores.argmin()))",
        new="pair = (int(scores.argmin()), int(scores.argmax()))",
        tests="tests/unit/task/test_group_losses.py",
    ),
    Mutant(
        trap="online dpo: ties teach something",
        file="sheeprlhf/task/train/online_dpo.py",
        old="        if np.array_equal(best, worst):",
        new="        if False:",
        tests="tests/unit/task/test_group_losses.py",
    ),
    Mutant(
        trap="grpo: the KL is no part of the loss",
        file="sheeprlhf/task/train/grpo.py",
        old="(losses_N + task.init_kl_coeff * kl_N)",
        new="(losses_N - task.init_kl_coeff * kl_N)",
        tests="tests/unit/task/test_group_losses.py",
    ),
    Mutant(
        trap="grpo: how the losses of tokens are added up",
        file="sheeprlhf/task/train/grpo.py",
        old='AVERAGES = {"grpo": "sequence", "dapo": "token"',
        new='AVERAGES = {"grpo": "token", "dapo": "sequence"',
        tests="tests/unit/task/test_group_losses.py",
    ),
]
