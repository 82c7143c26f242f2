r"""Losses of group-relative policy optimization, as pure functions of log-probabilities.

Shapes: B completions, T tokens of the longest. ``mask`` is (B, T), 1 for tokens that count. With A the advantage,
rho = pi / pi_old the importance ratio of a token (or of a whole completion: GSPO), and k the KL estimate::

    token loss = -min(min(rho, delta) A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) * w + beta * k

w is the correction for tokens that another engine sampled. The token losses are then averaged:

==========  ====================================================================  ==================
loss type   average                                                               paper
==========  ====================================================================  ==================
grpo, gspo  over the tokens of each completion, then over completions             arXiv:2402.03300
bnpo        over all tokens of the batch                                          as in TRL
dr_grpo     sum over tokens, divided by B times the maximum completion length     arXiv:2503.20783
dapo        over all tokens of the accumulated batch (``num_items``)              arXiv:2503.14476
==========  ====================================================================  ==================

Nothing at a masked token enters value or gradient, whatever stands there; a batch without a token that counts has
loss 0 and gradient 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo"]
Level = Literal["token", "sequence"]
Scaling = Literal["group", "batch", "none"]

logger = get_logger(__name__)


@dataclass(frozen=True)
class PolicyOptions:
    """Hyperparameters of the policy loss.

    Attributes:
        loss_type: How token losses are averaged; see the module. ``gspo`` is ``grpo`` with ratios of sequences.
        epsilon: The ratio is clipped from below at 1 - epsilon.
        epsilon_high: And from above at 1 + epsilon_high; None means epsilon (DAPO's "clip higher" sets it apart).
        delta: Upper bound of the ratio where clipping would not bind, which is with negative advantages; above
            1 + epsilon_high (two-sided clipping, arXiv:2505.07291). None for none.
        beta: Weight of the KL estimate; 0 leaves it out.
        level: Ratios of single tokens, or of whole completions (geometric mean; GSPO, arXiv:2507.18071).
        max_completion_length: Needed by ``dr_grpo``.
        weighted_kl: Multiply the KL estimate by the importance ratio, which makes its gradient that of the KL
            divergence (DeepSeek-V3.2, arXiv:2512.02556; TRL's ``use_bias_correction_kl``).
    """

    loss_type: LossType = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    level: Level = "token"
    max_completion_length: int | None = None
    weighted_kl: bool = False

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(LossType):
            raise ConfigError(f"loss_type must be one of {', '.join(get_args(LossType))}", got=self.loss_type)
        if self.level not in get_args(Level):
            raise ConfigError("importance_sampling_level must be token or sequence", got=self.level)
        if not 0 <= self.epsilon < 1:
            raise ConfigError("epsilon must be in [0, 1)", got=self.epsilon, do="0.2 is usual.")
        if self.epsilon_high is not None and not self.epsilon_high >= 0:
            raise ConfigError("epsilon_high must not be negative", got=self.epsilon_high)
        if self.delta is not None and not self.delta > 1 + self.upper:
            raise ConfigError(
                "delta must be above 1 + epsilon_high, or it would do the clipping's work", got=self.delta
            )
        if not self.beta >= 0:
            raise ConfigError("beta must not be negative", got=self.beta, do="Use 0 for no KL term.")
        if self.loss_type == "dr_grpo" and not self.max_completion_length:
            raise ConfigError("dr_grpo divides by the maximum completion length", do="Set max_completion_length.")

    @property
    def upper(self) -> float:
        """The distance of the upper clip from 1."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def by_sequence(self) -> bool:
        """Whether ratios are those of whole completions."""
        return self.level == "sequence" or self.loss_type == "gspo"


@dataclass(frozen=True)
class PolicyLoss:
    """The loss (a number with gradient), and what to report of it (numbers without).

    Attributes:
        loss: What to differentiate.
        kl: Mean KL estimate a token; None without a reference.
        clipped_low: Share of tokens at which the lower clip binds.
        clipped_high: Share at which the upper one does.
    """

    loss: torch.Tensor
    kl: torch.Tensor | None
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    options: PolicyOptions | None = None,
    *,
    ref_logprobs: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
) -> PolicyLoss:
    """The loss of a batch of completions; see the module for its form.

    Args:
        logprobs: (B, T) log pi of the tokens.
        old_logprobs: (B, T) the same when they were sampled; None means: by this very model.
        advantages: (B,), or (B, T) where they differ within a completion.
        mask: (B, T) tokens that count.
        options: Hyperparameters.
        ref_logprobs: (B, T) log-probabilities under the reference model; needed if ``beta`` is not 0.
        correction: (B, T) or (B, 1), w; see :func:`truncated_importance`.
        num_items: For ``dapo``: tokens that count in the whole accumulated batch; None means in this one.

    Returns:
        The loss, not divided by any number of accumulation steps.

    Raises:
        ConfigError: ``beta`` is not 0 and there is no reference.
    """
    options = options or PolicyOptions()
    if options.beta and ref_logprobs is None:
        raise ConfigError("the KL term needs the reference's log-probabilities", do="Pass ref_logprobs, or beta=0.")
    counts = mask.bool()
    logprobs = _clean(logprobs, counts)
    old = logprobs.detach() if old_logprobs is None else _clean(old_logprobs, counts)
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    ratio = importance_ratio(logprobs, old, counts, by_sequence=options.by_sequence)
    clipped = ratio.clamp(1 - options.epsilon, 1 + options.upper)
    bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)
    losses = -torch.minimum(bounded * advantages, clipped * advantages)
    if correction is not None:
        losses = losses * (_clean(correction, counts) if correction.shape == counts.shape else correction)
    kl = None if ref_logprobs is None else kl_estimate(logprobs, _clean(ref_logprobs, counts))
    if kl is not None and options.weighted_kl:
        kl = kl * ratio
    if options.beta and kl is not None:
        losses = losses + options.beta * kl
    low = (ratio < 1 - options.epsilon) & (advantages < 0)
    high = (ratio > 1 + options.upper) & (advantages > 0)
    return PolicyLoss(
        loss=_average(losses.expand(counts.shape), counts, options, num_items),
        kl=None if kl is None else _mean(kl.detach(), counts),
        clipped_low=_mean(low.to(logprobs.dtype).expand(counts.shape), counts),
        clipped_high=_mean(high.to(logprobs.dtype).expand(counts.shape), counts),
    )


def importance_ratio(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor, *, by_sequence: bool = False
) -> torch.Tensor:
    """Ratio pi / pi_old: (B, T) for every token, or (B, 1) the geometric mean over each completion's tokens (GSPO)."""
    change = logprobs - old_logprobs
    if by_sequence:
        change = ((change * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
    return torch.exp(change)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(pi || ref) at sampled tokens, never negative: exp(d) - d - 1 with d = log ref - log pi.

    The estimator "k3" of Schulman 2020 (http://joschu.net/blog/kl-approx.html). Any shape.
    """
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference


def group_advantages(
    rewards: torch.Tensor, group_size: int, scaling: Scaling = "group", eps: float = 1e-4
) -> torch.Tensor:
    """Rewards less the mean of their group, divided by a standard deviation.

    Args:
        rewards: (N,) in groups of ``group_size`` neighbours, one group a prompt. NaN marks a completion that could
            not be rated: it counts in no mean, and gets advantage 0.
        group_size: Completions a prompt.
        scaling: ``group`` divides by the standard deviation of each group (arXiv:2402.03300), ``batch`` by that of
            all rewards (arXiv:2508.08221), ``none`` by nothing (Dr. GRPO, arXiv:2503.20783).
        eps: Added to the standard deviation.

    Returns:
        (N,) advantages. A group of one, or of equal rewards, gets 0.

    Raises:
        ConfigError: The groups do not come out even, or an unknown scaling.
    """
    if scaling not in get_args(Scaling):
        raise ConfigError("scale_rewards must be one of group, batch, none", got=scaling)
    if group_size < 1 or rewards.dim() != 1 or rewards.numel() % group_size:
        raise ConfigError("rewards must come in whole groups", got=f"{tuple(rewards.shape)} by {group_size}")
    groups = rewards.view(-1, group_size)
    centered = groups - groups.nanmean(dim=1, keepdim=True)
    if scaling == "group":
        centered = centered / (_deviation(groups, dim=1) + eps)
    elif scaling == "batch":
        centered = centered / (_deviation(rewards[None], dim=1) + eps)
    return centered.nan_to_num(nan=0.0).flatten()


def truncated_importance(
    logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, mask: torch.Tensor, cap: float | None = 2.0
) -> torch.Tensor:
    """min(pi_train / pi_sampler, cap) of every token: corrects for an engine that computes otherwise than training.

    Truncated importance sampling (Ionides 2008; for reinforcement learning with two engines, Yao et al. 2025).

    Args:
        logprobs: (B, T) log-probabilities of the sampled tokens by the training computation.
        sampling_logprobs: (B, T) by the engine that sampled; NaN where it did not say: no correction there.
        mask: (B, T) tokens that count; 1 elsewhere.
        cap: Upper bound; None for none.

    Returns:
        (B, T), without gradient.
    """
    difference = (logprobs - sampling_logprobs).detach()
    ratio = torch.where(mask.bool(), difference, 0.0).nan_to_num(nan=0.0, posinf=80.0, neginf=-80.0).exp()
    return ratio if cap is None else ratio.clamp(max=cap)


def sampling_correction(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    mode: str = "token_truncate",
    low: float | None = None,
    high: float | None = 2.0,
) -> torch.Tensor:
    """Weights for tokens that were sampled otherwise than training computes; see :func:`truncated_importance`.

    Args:
        logprobs: (B, T), as there.
        sampling_logprobs: (B, T), as there.
        mask: (B, T), as there.
        mode: ``token_…`` for the ratio of each token, ``sequence_…`` for the product over each completion's tokens;
            ``…_truncate`` bounds it, ``…_mask`` gives 0 to what is out of bounds.
        low: Lower bound; None for none.
        high: Upper bound; None for none.

    Returns:
        (B, T) or (B, 1), without gradient.

    Raises:
        ConfigError: An unknown mode.
    """
    if mode not in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        raise ConfigError("unknown mode of importance sampling", got=mode, do='Use "token_truncate".')
    ratio = truncated_importance(logprobs, sampling_logprobs, mask, cap=None)
    if mode.startswith("sequence"):
        ratio = ratio.log().sum(-1, keepdim=True).exp()
    if mode.endswith("truncate"):
        return ratio if low is None and high is None else ratio.clamp(low, high)
    outside = (ratio < (-torch.inf if low is None else low)) | (ratio > (torch.inf if high is None else high))
    return ratio.masked_fill(outside, 0.0)


def without_truncated(mask: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
    """The mask with every completion taken out that was cut off at the length limit (DAPO's overlong filtering).

    Warns, once, if nothing is left: such a batch teaches nothing, and its loss is 0.

    Args:
        mask: (B, T) tokens that count.
        finished: (B,) whether a completion ended by itself.
    """
    kept = mask * finished.to(mask.dtype)[:, None]
    if mask.any() and not kept.any():
        logger.warning(
            "every completion of a batch was cut off at the maximum length, so the batch counts for nothing: raise "
            "max_completion_length, or leave mask_truncated_completions out",
            extra={"once": True},
        )
    return kept


def _clean(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``values`` with zeros where nothing counts, so that not even an infinity there reaches a sum or a gradient."""
    return torch.where(counts, values, 0.0)


def _mean(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (values * counts).sum() / counts.sum().clamp(min=1)


def _average(
    losses: torch.Tensor, counts: torch.Tensor, options: PolicyOptions, num_items: torch.Tensor | float | None
) -> torch.Tensor:
    total = torch.where(counts, losses, 0.0).sum(-1)
    if options.loss_type in ("grpo", "gspo"):
        return (total / counts.sum(-1).clamp(min=1)).mean()
    if options.loss_type == "dr_grpo":
        return total.sum() / (counts.shape[0] * (options.max_completion_length or 1))
    if options.loss_type == "bnpo" or num_items is None:
        return total.sum() / counts.sum().clamp(min=1)
    items = torch.as_tensor(num_items, dtype=total.dtype, device=total.device)
    return total.sum() / items.clamp(min=1)


def _deviation(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Standard deviation with the unbiased divisor, of the numbers among ``values``; 0 for a single one."""
    known = ~values.isnan()
    squares = (values - values.nanmean(dim=dim, keepdim=True)).nan_to_num(nan=0.0) ** 2
    return (squares.sum(dim=dim, keepdim=True) / (known.sum(dim=dim, keepdim=True) - 1).clamp(min=1)).sqrt()
