"""Mistakes in rewards, advantages and losses of policy-gradient training that their tests notice."""

from tests.mutants.mutant import Mutant

Lines = list[tuple[str, str, str]]  # source text, what replaces it, the test that fails

_LAST_PLACE = "mask_ST.sum(1, keepdim=True) - 1"
_BOOTSTRAP = "torch.where(_last(mask_ST), last_values_S[:, None], next_values_ST)"
_NEXT = "next_values_ST[:, :-1] = values_ST[:, 1:]"
_RETURN = "return advantages_ST, advantages_ST + values_ST"
_SAMPLE = "max(scores_PG.shape[1] - 1, 1)"
_ERROR = "min(max(kl / target - 1.0, -0.2), 0.2)"
_IDENTICAL = "k3_is_never_negative_and_both_are_zero_for_identical_policies"
_FOLLOWS = "the_kl_coefficient_follows_the_kl"

ADVANTAGE: dict[str, Lines] = {
    "4 reward of a token": [
        (_LAST_PLACE, "mask_ST.sum(1, keepdim=True) - 2", "token_rewards_by_hand"),  # a token early
        (_LAST_PLACE, "mask_ST.shape[1] - 1", "token_rewards_by_hand"),  # at the end of the padding
        ("-kl_coeff * kl_ST", "kl_coeff * kl_ST", "token_rewards_by_hand"),
        ("torch.where(mask_ST, -kl_coeff * kl_ST, 0.0)", "-kl_coeff * kl_ST", "token_rewards_are_the_definitions"),
    ],
    "rl: places of tokens": [
        ("< lengths_S[:, None]", "<= lengths_S[:, None]", "by_position_keeps_the_order"),
        ("    if sum(lengths) != len(values_N):", "    if False:", "by_position_wants_all_values"),
    ],
    "14 estimates of the kl": [
        ("torch.expm1(u_N) - u_N", "torch.exp(u_N) - 1.0 - u_N", _IDENTICAL),  # below 0 by rounding
        ("        return -u_N\n", "        return u_N.abs()\n", "the_mean_of_the_estimates_is_the_kl"),
        ("reference_N - logprobs_N", "logprobs_N - reference_N", "the_mean_of_the_estimates_is_the_kl"),
        ("torch.expm1(u_N) - u_N", "torch.expm1(u_N).detach() - u_N", "k3_as_a_loss_has_its_own_gradient"),
    ],
    "16 advantages": [
        (_BOOTSTRAP, "next_values_ST", "gae_is_the_definition"),
        (_BOOTSTRAP, "next_values_ST + last_values_S[:, None]", "gae_is_the_definition"),
        (_BOOTSTRAP, "torch.cat([next_values_ST[:, :-1], last_values_S[:, None]], 1)", "gae_is_the_definition"),
        ("    values_ST = torch.where(mask_ST, values_ST, 0.0)\n", "", "gae_is_the_definition"),  # padding leaks
        ("torch.where(mask_ST, rewards_ST + gamma * next_values_ST - values_ST, 0.0)", "rewards_ST", "gae_by_hand"),
        (_NEXT, "next_values_ST[:] = values_ST", "gae_by_hand"),
        (_NEXT, "next_values_ST[:] = torch.roll(values_ST, -1, 1)", "gae_is_the_definition"),
        ("gamma * next_values_ST", "next_values_ST", "gae_is_the_definition"),
        ("gamma * lam * advantage_S", "lam * advantage_S", "gae_is_the_definition"),
        ("gamma * lam * advantage_S", "gamma * advantage_S", "gae_is_the_definition"),
        (_RETURN, "return advantages_ST, advantages_ST", "gae_by_hand"),
        (_RETURN, "return advantages_ST, whiten(advantages_ST, mask_ST) + values_ST", "gae_by_hand"),
    ],
    "17 moments of a rollout": [
        ("moments(values_ST, mask_ST)\n", "moments(values_ST)\n", "whitening_is_the_definition"),
        ("counted.var(correction=0)", "counted.var()", "whitening_of_one_token_and_of_none"),
        ("values[mask]).double()", "values[mask])", "equal_values_are_whitened_to_zero"),
        ("    if counted.numel() == 0:", "    if False:", "moments_by_hand"),
        ("whitened_ST if shift_mean", "whitened_ST if not shift_mean", "whitening_is_the_definition"),
        (") * torch.rsqrt(variance + eps)", ") / (variance + eps)", "whitening_is_the_definition"),
        ("torch.where(mask_ST, whitened_ST, 0.0).to", "whitened_ST.to", "whitening_is_the_definition"),
    ],
    "rl: advantages of a group": [
        ("scores_PG.double().mean(1, keepdim=True)", "scores_PG.double().mean()", "group_advantages_by_hand"),
        (_SAMPLE, "scores_PG.shape[1]", "group_advantages_by_hand"),
        (_SAMPLE, "(scores_PG.shape[1] - 1)", "equal_scores_teach_nothing"),  # a group of one
        ("(variance_P1.sqrt() + eps)", "(variance_P1 + eps).sqrt()", "group_advantages_by_hand"),
        ("    if scale:", "    if True:", "group_advantages_by_hand"),
        ("- scores64_PG) / (group - 1)", ") / group", "leave_one_out_by_hand"),  # one's own score is in the baseline
        ("scores64_PG = scores_PG.double()", "scores64_PG = scores_PG", "equal_scores_teach_nothing"),
    ],
    "rl: the kl coefficient": [
        ("1.0 + error *", "1.0 - error *", _FOLLOWS),
        (_ERROR, "kl / target - 1.0", _FOLLOWS),
        (_ERROR, "min(max(kl - target, -0.2), 0.2)", _FOLLOWS),
        ("error * num_responses / horizon", "error / horizon", _FOLLOWS),
    ],
}

_CLIPPED = "ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high))"
_WHOLE = "-advantages_S * _ratio(sums_S, old_S)"
_BY_HAND, _VALUES = "policy_losses_by_hand", "value_losses_by_hand"
_STEP, _COMPANY = "the_loss_of_a_step_by_hand", "a_weight_does_not_depend_on_the_company"

PPO: dict[str, Lines] = {
    "rl: policy loss": [
        ("torch.maximum(-advantages_N * ratio_N", "torch.minimum(-advantages_N * ratio_N", _BY_HAND),
        ("torch.maximum(-advantages_N * ratio_N", "torch.maximum(advantages_N * ratio_N", _BY_HAND),
        (_CLIPPED, "ratio_N.clamp(1.0 - clip_high, 1.0 + clip_low))", _BY_HAND),
        (_CLIPPED, "ratio_N.clamp(1.0 / (1.0 + clip_low), 1.0 + clip_high))", _BY_HAND),
        ("torch.exp((logprobs - old)", "torch.exp((old - logprobs)", _BY_HAND),
        (
            "torch.exp((logprobs - old)",
            "torch.exp((logprobs - old).detach()",
            "at_ratio_one_the_gradient_is_reinforces",
        ),
        (".clamp(max=MAX_LOG_RATIO)", "", "no_ratio_overflows"),
    ],
    "11 ratio of a response": [
        (_WHOLE, "-advantages_S * (sums_S - old_S)", "a_whole_response_has_one_ratio"),
        ("clip_low=clip, clip_high=clip", "clip_low=1.0, clip_high=1e9", "a_whole_response_has_one_ratio"),
        (
            _WHOLE,
            "policy_losses(sums_S, old_S, advantages_S, clip_low=0.2, clip_high=0.2)",
            "policy_losses_are_the_definition",
        ),
    ],
    "9 weights of tokens": [
        ("torch.ones(sum(lengths))", "torch.ones(sum(lengths)) / sum(lengths)", _COMPANY),
        ("(1.0 / lengths_S)", "(1.0 / lengths_S.sum() + 0.0 * lengths_S)", _COMPANY),
        ("1.0 / max_length)", "1.0 / max(lengths))", _COMPANY),
    ],
    "11 per token or per response": [
        ("(1.0 / lengths_S)", "(1.0 + 0.0 * lengths_S)", _STEP),
        ("1.0 / max_length)", "1.0)", _STEP),
        ("torch.ones(sum(lengths))", "(1.0 / lengths_S).repeat_interleave(lengths_S)", _STEP),
    ],
    "rl: value loss": [
        ("torch.maximum(losses_N, ", "torch.minimum(losses_N, ", _VALUES),
        ("old_N - clip, old_N + clip", "returns_N - clip, returns_N + clip", _VALUES),
        ("return 0.5 * losses_N", "return losses_N", _VALUES),
    ],
    "rl: figures": [
        ("0.5 * (logprobs_N - old_N).square()", "old_N - logprobs_N", "policy_figures_by_hand"),
        ("(-advantages_N * clipped_N > ", "(-advantages_N * clipped_N != ", "policy_figures_by_hand"),
        ("@torch.no_grad()\n", "", "policy_figures_by_hand"),
        ("returns.numel() == 0 or returns.min() == returns.max()", "False", "explained_variance_by_hand"),
        ("moments(returns.double() - values.double())", "moments(values.double())", "explained_variance_by_hand"),
        ("/ moments(returns)[1]", "/ moments(values)[1]", "explained_variance_by_hand"),
    ],
}

MUTANTS = [
    Mutant(trap, f"sheeprlhf/loss/{name}.py", old, new, f"tests/unit/loss/test_{name}.py::test_{test}")
    for name, traps in (("advantage", ADVANTAGE), ("ppo", PPO))
    for trap, lines in traps.items()
    for old, new, test in lines
]
