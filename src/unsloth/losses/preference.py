r"""Losses that learn from preferences, as pure functions of log-probabilities.

Shapes: B pairs or rated answers. A sequence log-probability is the sum over the tokens of one answer y to a prompt x,
log pi(y|x), of shape (B,); a length is the number of those tokens. All functions are differentiable in the
log-probabilities of the policy and compute at the dtype they are given (float32 in training).

Notation, used throughout: w the chosen and l the rejected answer, r = log pi(y|x) - log ref(y|x) the log-ratio to the
reference model, D = r_w - r_l, s the logistic function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn.functional import logsigmoid, relu

from unsloth.core.errors import ConfigError

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclass(frozen=True)
class DPOOptions:
    """Hyperparameters of the DPO family.

    Attributes:
        beta: Strength of the tie to the reference model; tau in IPO.
        label_smoothing: Share of pairs taken to be labelled the wrong way round.
        divergence: The f-divergence to the reference, for the losses in ``DIVERGENCE_LOSSES`` (f-DPO,
            arXiv:2309.16240).
        alpha: Of the alpha-divergence.
        discopop_tau: Temperature of the blend in DiscoPOP.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError("beta must be positive", got=self.beta, do="0.1 is usual.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError("label_smoothing must be in [0, 0.5)", got=self.label_smoothing, do="Use 0 for none.")
        if self.divergence not in get_args(Divergence):
            raise ConfigError(
                f"f_divergence_type must be one of {', '.join(get_args(Divergence))}", got=self.divergence
            )
        if not self.discopop_tau > 0:
            raise ConfigError("discopop_tau must be positive", got=self.discopop_tau)


@dataclass(frozen=True)
class Pairs:
    """What the losses of the DPO family look at, each of shape (B,).

    Attributes:
        chosen: log pi(y_w|x).
        rejected: log pi(y_l|x).
        ref_chosen: log ref(y_w|x), a constant.
        ref_rejected: log ref(y_l|x), a constant.
        chosen_length: Tokens of y_w.
        rejected_length: Tokens of y_l.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_length: torch.Tensor
    rejected_length: torch.Tensor

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """r_w."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """r_l."""
        return self.rejected - self.ref_rejected


def divergence_score(log_ratio: torch.Tensor, options: DPOOptions) -> torch.Tensor:
    """f'(t) of the chosen f-divergence at t = exp(log_ratio), without the constant that cancels in a difference.

    reverse KL: log t. Forward KL: 1 - 1/t. Jensen-Shannon: log(2t / (1 + t)). Alpha: (t^(a-1) - 1) / (a - 1), which
    tends to log t as a tends to 1. The exponent is capped at 80, where float32 would overflow.
    """
    if options.divergence == "forward_kl":
        return -torch.expm1((-log_ratio).clamp(max=80.0))
    if options.divergence == "js_divergence":
        return math.log(2.0) + logsigmoid(log_ratio)
    if options.divergence == "alpha_divergence" and abs(options.alpha - 1.0) > 1e-6:
        power = options.alpha - 1.0
        return torch.expm1((power * log_ratio).clamp(max=80.0)) / power
    return log_ratio


def _difference(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    return divergence_score(pairs.chosen_ratio, options) - divergence_score(pairs.rejected_ratio, options)


def _mean_difference(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    chosen = divergence_score(pairs.chosen_ratio, options) / pairs.chosen_length.clamp(min=1)
    return chosen - divergence_score(pairs.rejected_ratio, options) / pairs.rejected_length.clamp(min=1)


def _smoothed(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def _sigmoid(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """-log s(beta D) (arXiv:2305.18290); with label smoothing e, -(1-e) log s(beta D) - e log s(-beta D) (cDPO)."""
    return _smoothed(options.beta * _difference(pairs, options), options.label_smoothing)


def _sigmoid_norm(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """As sigmoid, with log-ratios per token (arXiv:2411.15124)."""
    return _smoothed(options.beta * _mean_difference(pairs, options), options.label_smoothing)


def _hinge(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """max(0, 1 - beta D) (SLiC, arXiv:2305.10425)."""
    return relu(1 - options.beta * _difference(pairs, options))


def _ipo(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """(D - 1 / (2 beta))^2 with log-ratios per token (arXiv:2310.12036, equation 17)."""
    return (_mean_difference(pairs, options) - 1 / (2 * options.beta)) ** 2


def _robust(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """(-(1-e) log s(beta D) + e log s(-beta D)) / (1 - 2e): unbiased under flipped labels (arXiv:2403.00409)."""
    logits, flipped = options.beta * _difference(pairs, options), options.label_smoothing
    return (-(1 - flipped) * logsigmoid(logits) + flipped * logsigmoid(-logits)) / (1 - 2 * flipped)


def _exo_pair(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """KL(q || p) for q = (s(beta D), s(-beta D)) and p = (1-e, e) (EXO, arXiv:2402.00856, equation 16)."""
    logits = options.beta * _difference(pairs, options)
    log_p, log_not_p = math.log1p(-options.label_smoothing), math.log(options.label_smoothing)
    chosen = torch.sigmoid(logits) * (logsigmoid(logits) - log_p)
    return chosen + torch.sigmoid(-logits) * (logsigmoid(-logits) - log_not_p)


def _nca_pair(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """-log s(beta r_w) - (log s(-beta r_w) + log s(-beta r_l)) / 2 (arXiv:2402.05369)."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def _bco_pair(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """-log s(beta r_w) - log s(-beta r_l), BCO without its running shift (arXiv:2404.04656)."""
    return -logsigmoid(options.beta * pairs.chosen_ratio) - logsigmoid(-options.beta * pairs.rejected_ratio)


def _sppo_hard(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2: win rates of 1 and 0 (arXiv:2405.00675, equation 4.7)."""
    target = 0.5 / options.beta
    return (pairs.chosen_ratio - target) ** 2 + (pairs.rejected_ratio + target) ** 2


def _aot(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """Sigmoid loss between the sorted margins of policy and reference (arXiv:2406.05882); in sorted order."""
    policy = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return _smoothed(options.beta * (policy - reference), options.label_smoothing)


def _aot_unpaired(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """Sigmoid loss between the sorted log-ratios of chosen and rejected answers (arXiv:2406.05882)."""
    difference = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _smoothed(options.beta * difference, options.label_smoothing)


def _apo_zero(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """s(-beta r_w) + s(beta r_l): for chosen answers better than the model's (arXiv:2408.06266, equation 7)."""
    return torch.sigmoid(-options.beta * pairs.chosen_ratio) + torch.sigmoid(options.beta * pairs.rejected_ratio)


def _apo_down(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """s(beta r_w) + s(-beta D): for chosen answers worse than the model's (arXiv:2408.06266, equation 8)."""
    margin = pairs.chosen_ratio - pairs.rejected_ratio
    return torch.sigmoid(options.beta * pairs.chosen_ratio) + torch.sigmoid(-options.beta * margin)


def _discopop(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """Blend of -log s(z) and exp(-z), z = beta D, by s(z / tau) (arXiv:2406.08414, equation 5)."""
    logits = options.beta * _difference(pairs, options)
    share = torch.sigmoid(logits / options.discopop_tau)
    return (1 - share) * -logsigmoid(logits) + share * torch.exp(-logits)


def _sft(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """-log pi(y_w|x) per token of all chosen answers together, for every pair (RPO, arXiv:2404.19733)."""
    mean = -pairs.chosen.sum() / pairs.chosen_length.sum().clamp(min=1)
    return mean.expand(pairs.chosen.shape)


_DPO: dict[str, Callable[[Pairs, DPOOptions], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}
DPO_LOSSES = tuple(_DPO)
"""Names of the losses of the DPO family; each function's first line has its equation."""
DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Those for which another divergence than reverse KL is defined: its partition term cancels in D."""


def check_dpo(loss_types: Sequence[str], options: DPOOptions) -> None:
    """Raise :class:`ConfigError` if a loss is unknown or does not go with the options."""
    for name in loss_types:
        if name not in _DPO:
            raise ConfigError(f"loss_type must be one of {', '.join(DPO_LOSSES)}", got=name)
        if options.divergence != "reverse_kl" and name not in DIVERGENCE_LOSSES:
            raise ConfigError(
                f"f_divergence_type is not defined for loss_type={name!r}",
                got=options.divergence,
                do=f"Leave it out, or use one of {', '.join(DIVERGENCE_LOSSES)}.",
            )
        if name == "exo_pair" and options.label_smoothing == 0:
            raise ConfigError(
                'loss_type="exo_pair" needs label_smoothing above 0', got=0.0, do="The paper recommends 1e-3."
            )


def dpo_loss(pairs: Pairs, loss_type: str = "sigmoid", options: DPOOptions | None = None) -> torch.Tensor:
    """The loss of every pair, for direct preference optimization and its variants.

    Args:
        pairs: Log-probabilities and lengths, each (B,).
        loss_type: One of :data:`DPO_LOSSES`.
        options: Hyperparameters.

    Returns:
        (B,); for ``aot`` and ``aot_unpaired`` not in the order of the pairs.

    Raises:
        ConfigError: An unknown loss, or options that it does not go with.
    """
    options = options or DPOOptions()
    check_dpo([loss_type], options)
    return _DPO[loss_type](pairs, options)


def kto_loss(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
) -> torch.Tensor:
    """The loss of every rated answer, weighted (KTO, arXiv:2402.01306, equation 8).

    With z0 the divergence to the reference::

        desirable:    1 - s(beta (r - z0))          undesirable:    1 - s(beta (z0 - r))

    ``apo_zero_unpaired`` (arXiv:2408.06266) is the same with z0 = 0.

    Args:
        logprobs: (B,) log pi(y|x).
        ref_logprobs: (B,) log ref(y|x).
        desirable: (B,) booleans: whether the answer is a good one.
        kl: z0, a number that is not differentiated; see :func:`kto_divergence`.
        beta: Strength of the tie to the reference model.
        desirable_weight: Weight of good answers.
        undesirable_weight: Weight of bad ones.
        loss_type: As above.

    Returns:
        (B,), in the order of the answers.
    """
    if loss_type not in ("kto", "apo_zero_unpaired"):
        raise ConfigError("loss_type must be kto or apo_zero_unpaired", got=loss_type)
    desirable = desirable.bool()
    shift = 0.0 if loss_type == "apo_zero_unpaired" else kl
    gain = beta * (logprobs - ref_logprobs - shift)
    sign = torch.ones_like(gain).masked_fill(desirable, -1.0)
    weight = torch.full_like(gain, undesirable_weight).masked_fill(desirable, desirable_weight)
    return weight * torch.sigmoid(sign * gain)


def kto_divergence(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """KTO's estimate of the divergence to the reference: max(0, mean of r) over mismatched prompts and answers.

    Args:
        logprobs: (B,) log pi(y'|x) of answers y' that belong to other prompts.
        ref_logprobs: (B,) log ref(y'|x).

    Returns:
        A number without gradient.
    """
    return (logprobs - ref_logprobs).mean().clamp(min=0).detach()


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, by log(-expm1(x)) near 0 and log1p(-exp(x)) elsewhere (Maechler 2012)."""
    near = x > -math.log(2.0)
    # Each branch sees harmless numbers where the other is taken, so that neither gives a gradient of 0 * inf.
    above = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    below = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, above, below)


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log s(log odds(y_w) - log odds(y_l)) of every pair (ORPO, arXiv:2403.07691, equations 4 to 7).

    odds(y) = p / (1 - p) with p the geometric mean of the answer's token probabilities. The loss of ORPO is the
    cross-entropy of the chosen sequences plus lambda times this.

    Args:
        chosen: (B,) log p of the chosen answers: mean log-probability a token.
        rejected: (B,) the same of the rejected ones.
    """
    # An answer that is certain to the last digit would have infinite odds.
    tiny = -torch.finfo(chosen.dtype).eps
    chosen, rejected = chosen.clamp(max=tiny), rejected.clamp(max=tiny)
    return -logsigmoid((chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected)))


def cpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    alpha: float = 0.0,
) -> torch.Tensor:
    """The loss of every pair without a reference model.

    With d = log pi(y_w|x) - log pi(y_l|x): ``sigmoid`` -log s(beta d) (CPO, arXiv:2401.08417), ``hinge``
    max(0, 1 - beta d), ``ipo`` (d - 1 / (2 beta))^2, ``simpo`` -log s(beta d - gamma) (SimPO, arXiv:2405.14734).
    ``ipo`` and ``simpo`` are meant for mean log-probabilities a token, the others for sums. Label smoothing e turns
    -log s(z) into -(1-e) log s(z) - e log s(-z). With ``alpha`` not 0, (1 - p^-alpha) / alpha takes the place of
    log p (AlphaPO, arXiv:2501.03884).

    Args:
        chosen: (B,) log-probabilities of the chosen answers.
        rejected: (B,) those of the rejected answers.
        loss_type: As above.
        beta: Scale of the rewards.
        label_smoothing: Share of pairs taken to be labelled the wrong way round.
        gamma: Margin that SimPO asks for.
        alpha: Shape of the reward.
    """
    if not beta > 0:
        raise ConfigError("beta must be positive", got=beta, do="0.1 is usual, for SimPO 2.0.")
    difference = alpha_reward(chosen, alpha) - alpha_reward(rejected, alpha)
    if loss_type == "sigmoid":
        return _smoothed(beta * difference, label_smoothing)
    if loss_type == "simpo":
        return _smoothed(beta * difference - gamma, label_smoothing)
    if loss_type == "hinge":
        return relu(1 - beta * difference)
    if loss_type == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    raise ConfigError("loss_type must be one of sigmoid, hinge, ipo, simpo", got=loss_type)


def alpha_reward(logprobs: torch.Tensor, alpha: float) -> torch.Tensor:
    """AlphaPO's reward (1 - p^-alpha) / alpha of log p, which is log p itself for alpha = 0; any shape."""
    return logprobs if alpha == 0 else -torch.expm1(-alpha * logprobs) / alpha


def reward_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor | None = None,
    *,
    center_coefficient: float = 0.0,
) -> torch.Tensor:
    """The loss of every pair of scores, after Bradley and Terry: -log s(r_w - r_l - m) + c (r_w + r_l)^2.

    The margin is that of Llama 2 (arXiv:2307.09288), the second term, which keeps the mean score near 0, that of
    Eisenstein et al. 2023 (arXiv:2312.09244, equation 2).

    Args:
        chosen: (B,) scores of the chosen answers.
        rejected: (B,) scores of the rejected answers.
        margin: (B,) how much better the chosen answer is, or None.
        center_coefficient: c.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -logsigmoid(difference)
    return loss + center_coefficient * (chosen + rejected) ** 2 if center_coefficient else loss
