"""Direct preference optimisation and its variants: losses of pairs from the log-probabilities of the policy.

Letters: P pairs, E examples. For a response y, lp(y) is the SUM of its tokens' log-probabilities, EOS included, nats,
and h = lp(y) - lp_ref(y); w is the chosen response of a pair, l the rejected one; d = h_w - h_l; |y| counts tokens.
Every function returns one loss per pair or example, unreduced.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
MAX_EXPONENT = 20.0  # exp() of float32 overflows at 88


def sigmoid(h_w_P: Tensor, h_l_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Minus log sigmoid of beta d: DPO (arXiv 2305.18290) eq. 7; with label smoothing e Mitchell's eq. 3.

    The label is taken to be wrong with probability e: -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d).
    """
    d_P = beta * (h_w_P - h_l_P)
    return -(1.0 - label_smoothing) * logsigmoid(d_P) - label_smoothing * logsigmoid(-d_P)


def robust(h_w_P: Tensor, h_l_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """RDPO (arXiv 2403.00409): unbiased when labels are wrong with probability e < 1/2; may be negative.

    (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)
    """
    d_P, e = beta * (h_w_P - h_l_P), label_smoothing
    return (-(1.0 - e) * logsigmoid(d_P) + e * logsigmoid(-d_P)) / (1.0 - 2.0 * e)


def hinge(h_w_P: Tensor, h_l_P: Tensor, beta: float) -> Tensor:
    """RSO (arXiv 2309.06657), the hinge loss of SLiC on log-ratios: max(0, 1 - beta d)."""
    return relu(1.0 - beta * (h_w_P - h_l_P))


def ipo(h_w_P: Tensor, h_l_P: Tensor, length_w_P: Tensor, length_l_P: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036) eq. 17: (d - 1 / (2 beta))^2, with h per token.

    The paper's derivation leaves open whether h is a sum; its authors confirmed the mean over tokens (trl issue 1090).
    """
    return (h_w_P / length_w_P - h_l_P / length_l_P - 1.0 / (2.0 * beta)).square()


def apo_zero(h_w_P: Tensor, h_l_P: Tensor, beta: float) -> Tensor:
    """APO-zero (arXiv 2408.06266) eq. 7: 1 - sigmoid(beta h_w) + sigmoid(beta h_l), chosen up and rejected down."""
    return 1.0 - torch.sigmoid(beta * h_w_P) + torch.sigmoid(beta * h_l_P)


def apo_down(h_w_P: Tensor, h_l_P: Tensor, beta: float) -> Tensor:
    """APO-down (arXiv 2408.06266) eq. 8: sigmoid(beta h_w) + 1 - sigmoid(beta d), both down, rejected more."""
    return torch.sigmoid(beta * h_w_P) + 1.0 - torch.sigmoid(beta * (h_w_P - h_l_P))


def sigmoid_norm(h_w_P: Tensor, h_l_P: Tensor, length_w_P: Tensor, length_l_P: Tensor, beta: float) -> Tensor:
    """DPO of log-ratios per token (Tulu 3, arXiv 2411.15124): -log sigmoid(beta (h_w / |w| - h_l / |l|))."""
    return sigmoid(h_w_P / length_w_P, h_l_P / length_l_P, beta)


def exo(h_w_P: Tensor, h_l_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO of pairs (arXiv 2402.00856): KL(model, labels), where labels are wrong with probability e > 0.

    sigmoid(x) (log sigmoid(x) - log(1 - e)) + sigmoid(-x) (log sigmoid(-x) - log e), x = beta d; 0 at x = logit(1 - e).
    """
    x_P, e = beta * (h_w_P - h_l_P), label_smoothing
    better_P = torch.sigmoid(x_P) * (logsigmoid(x_P) - math.log1p(-e))
    return better_P + torch.sigmoid(-x_P) * (logsigmoid(-x_P) - math.log(e))


def nca(h_w_P: Tensor, h_l_P: Tensor, beta: float) -> Tensor:
    """NCA of pairs (arXiv 2402.05369): -log sigmoid(a) - log sigmoid(-a) / 2 - log sigmoid(-b) / 2 of a, b = beta h."""
    a_P, b_P = beta * h_w_P, beta * h_l_P
    return -logsigmoid(a_P) - 0.5 * logsigmoid(-a_P) - 0.5 * logsigmoid(-b_P)


def bco(h_w_P: Tensor, h_l_P: Tensor, beta: float, delta: float) -> Tensor:
    """BCO of pairs (arXiv 2404.04656): -log sigmoid(beta h_w - delta) - log sigmoid(delta - beta h_l).

    delta is a running mean of beta h over chosen and rejected responses.
    """
    return -logsigmoid(beta * h_w_P - delta) - logsigmoid(delta - beta * h_l_P)


def aot_partners(values_P: Tensor, others_P: Tensor) -> Tensor:
    """(P,) for each value the other value of the same rank: optimal transport in one dimension (arXiv 2406.05882)."""
    partners_P = torch.empty_like(others_P)
    partners_P[values_P.argsort(stable=True)] = others_P.sort().values
    return partners_P


def aot_unpaired(h_w_P: Tensor, h_l_P: Tensor, partners_P2: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """AOT of all chosen against all rejected responses (arXiv 2406.05882): DPO of the sorted h_w and the sorted h_l.

    `partners_P2` are the h_l of the rank of each h_w and the h_w of the rank of each h_l, without gradient. The sum
    over all pairs has the value and the gradient of the sorted loss.
    """
    of_h_w_P = sigmoid(h_w_P, partners_P2[:, 0], beta, label_smoothing)
    of_h_l_P = sigmoid(partners_P2[:, 1], h_l_P, beta, label_smoothing)
    return of_h_w_P + of_h_l_P - of_h_l_P.detach()


def sppo(h_w_P: Tensor, h_l_P: Tensor, beta: float) -> Tensor:
    """SPPO with certain labels (arXiv 2405.00675): (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2."""
    target = 0.5 / beta
    return (h_w_P - target).square() + (h_l_P + target).square()


def discopop(h_w_P: Tensor, h_l_P: Tensor, beta: float, tau: float) -> Tensor:
    """DiscoPOP (arXiv 2406.08414): (1 - m) (-log sigmoid(x)) + m exp(-x), x = beta d, m = sigmoid(x / tau)."""
    x_P = beta * (h_w_P - h_l_P)
    m_P = torch.sigmoid(x_P / tau)
    return (m_P - 1.0) * logsigmoid(x_P) + m_P * torch.exp((-x_P).clamp(max=MAX_EXPONENT))


def f_derivative(h: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(exp(h)) of f-DPO (arXiv 2309.16240), which replaces h in losses of d; all have slope > 0.

    reverse_kl: h; forward_kl: -exp(-h); js: log sigmoid(h); alpha: (exp((alpha - 1) h) - 1) / (alpha - 1), alpha < 1.
    Exponents are cut at MAX_EXPONENT.

    Raises:
        ValueError: the divergence is unknown.
    """
    if divergence == "reverse_kl":
        return h
    if divergence == "forward_kl":
        return -torch.exp((-h).clamp(max=MAX_EXPONENT))
    if divergence == "js":
        return logsigmoid(h)
    if divergence == "alpha":
        return torch.expm1(((alpha - 1.0) * h).clamp(max=MAX_EXPONENT)) / (alpha - 1.0)
    raise ValueError(f"divergence={divergence!r} is not one of {', '.join(DIVERGENCES)}")


def simpo(lp_w_P: Tensor, lp_l_P: Tensor, length_w_P: Tensor, length_l_P: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734) eq. 6: -log sigmoid(beta lp(w) / |w| - beta lp(l) / |l| - gamma); no reference."""
    return -logsigmoid(beta * (lp_w_P / length_w_P - lp_l_P / length_l_P) - gamma)


def orpo(lp_w_P: Tensor, lp_l_P: Tensor, length_w_P: Tensor, length_l_P: Tensor, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691) eqs. 6 and 7: NLL of the chosen response per token + beta * odds-ratio loss.

    No reference. With m = lp / |y| and log odds = m - log(1 - exp(m)) the second part is
    -log sigmoid(log odds_w - log odds_l).
    """
    m_w_P, m_l_P = lp_w_P / length_w_P, lp_l_P / length_l_P
    return -m_w_P - beta * logsigmoid(_log_odds(m_w_P) - _log_odds(m_l_P))


def _log_odds(m: Tensor) -> Tensor:
    """Log odds of m < 0, m - log(1 - exp(m)), exact near both ends; m = 0 is taken as the smallest step below it."""
    m = m.clamp(max=-torch.finfo(m.dtype).tiny)
    small = torch.where(m > -math.log(2.0), m, -1.0)  # the branch that is not taken must have a finite gradient too
    large = torch.where(m > -math.log(2.0), -1.0, m)
    return m - torch.where(m > -math.log(2.0), torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def kto(
    h_E: Tensor, desirable_E: Tensor, kl: Tensor, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """KTO (arXiv 2402.01306) eqs. 7 and 8, of unpaired examples.

    desirable:   weight * (1 - sigmoid(beta (h - kl)))
    undesirable: weight * (1 - sigmoid(beta (kl - h)))

    Args:
        h_E: (E,) log-ratios of the responses to their own prompts.
        desirable_E: (E,) bool.
        kl: () max(0, mean log-ratio of responses to other examples' prompts), nats; it gets no gradient.
        beta: strength of the pull towards the reference.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.
    """
    kl = kl.detach().clamp(min=0.0)
    sign_E = torch.where(desirable_E, 1.0, -1.0)
    weight_E = torch.where(desirable_E, desirable_weight, undesirable_weight)
    return weight_E * (1.0 - torch.sigmoid(sign_E * beta * (h_E - kl)))
