"""Contrastive preference optimization, and SimPO, which is one of its losses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from unsloth.core.errors import ConfigError
from unsloth.losses.preference import alpha_reward, cpo_loss
from unsloth.train.paired import PairedArguments, PairedTrainer
from unsloth.train.spellings import accepts_earlier_names

_LOSSES = ("sigmoid", "hinge", "ipo", "simpo")
_LENGTH_NORMALIZED = ("ipo", "simpo")


@accepts_earlier_names
@dataclass
class CPOConfig(PairedArguments):
    """Hyperparameters of CPO.

    Attributes:
        loss_type: ``sigmoid``, ``hinge``, ``ipo``, ``simpo``; see :func:`unsloth.losses.preference.cpo_loss`.
            ``alphapo`` means ``simpo`` without the cross-entropy.
        label_smoothing: Share of pairs taken to be labelled the wrong way round.
        cpo_alpha: Weight of the cross-entropy of the chosen answers. SimPO as published has 0.
        simpo_gamma: The margin that SimPO asks for.
        alpha: Shape of AlphaPO's reward; 0 for plain log-probabilities.
    """

    loss_type: str = field(default="sigmoid", metadata={"help": "sigmoid, hinge, ipo or simpo."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of pairs labelled wrong."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy of the chosen answers."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Margin of SimPO."})
    alpha: float = field(default=0.0, metadata={"help": "Shape of AlphaPO's reward."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type == "alphapo":
            self.loss_type, self.cpo_alpha = "simpo", 0.0


class CPOTrainer(PairedTrainer):
    """Trains to prefer the chosen answers over the rejected ones, without a reference (arXiv:2401.08417).

    The loss is :func:`unsloth.losses.preference.cpo_loss`, of log-probabilities that ``ipo`` and ``simpo`` take per
    token, plus ``cpo_alpha`` times the cross-entropy a token of the chosen answers. Arguments are those of
    :class:`unsloth.train.paired.PairedTrainer`.
    """

    config_class = CPOConfig

    def check(self, args: CPOConfig) -> None:
        """Raise :class:`ConfigError` for an unknown loss or a hyperparameter out of range."""
        if args.loss_type not in _LOSSES:
            raise ConfigError(f"loss_type must be one of {', '.join(_LOSSES)}", got=args.loss_type)
        if not args.beta > 0:
            raise ConfigError("beta must be positive", got=args.beta, do="0.1 is usual, for SimPO 2.0.")
        if not 0 <= args.label_smoothing < 0.5:
            raise ConfigError("label_smoothing must be in [0, 0.5)", got=args.label_smoothing, do="Use 0 for none.")

    def loss_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch of pairs, the chosen half first."""
        tokens = self.token_logprobs(model, inputs)
        lengths = inputs["completion_mask"][:, 1:].sum(dim=1).clamp(min=1)
        sums = tokens.sum(dim=1)
        chosen, rejected = (sums / lengths if self.args.loss_type in _LENGTH_NORMALIZED else sums).chunk(2)
        losses = cpo_loss(
            chosen,
            rejected,
            self.args.loss_type,
            beta=self.args.beta,
            label_smoothing=self.args.label_smoothing,
            gamma=self.args.simpo_gamma,
            alpha=self.args.alpha,
        )
        rewards = [self.args.beta * alpha_reward(side, self.args.alpha) for side in (chosen, rejected)]
        self.note_pairs((rewards[0], rewards[1]), (chosen, rejected))
        rows = len(chosen)
        entropy = -sums[:rows].sum() / lengths[:rows].sum()
        self.note({"nll_loss": entropy})
        return losses.mean() + self.args.cpo_alpha * entropy if self.args.cpo_alpha else losses.mean()
