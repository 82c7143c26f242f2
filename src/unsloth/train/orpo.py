"""Odds ratio preference optimization: fine-tuning on the chosen answers and the preference, in one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unsloth.core.errors import ConfigError
from unsloth.data.masking import IGNORED
from unsloth.losses.preference import odds_ratio_loss
from unsloth.train.paired import PairedArguments, PairedTrainer
from unsloth.train.spellings import accepts_earlier_names


@accepts_earlier_names
@dataclass
class ORPOConfig(PairedArguments):
    """Hyperparameters of ORPO: ``beta``, the weight of the odds ratio (lambda in the paper), and the common ones."""


class ORPOTrainer(PairedTrainer):
    """Trains on the chosen answers, and to prefer them over the rejected ones (arXiv:2403.07691); needs no reference.

    The loss is the cross-entropy a token of prompts and chosen answers, plus ``beta`` times
    :func:`unsloth.losses.preference.odds_ratio_loss`. Arguments are those of
    :class:`unsloth.train.paired.PairedTrainer`.
    """

    config_class = ORPOConfig

    def check(self, args: ORPOConfig) -> None:
        """Raise :class:`ConfigError` if ``beta`` is negative."""
        if not args.beta >= 0:
            raise ConfigError("beta must not be negative", got=args.beta, do="0.1 is usual.")

    def loss_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch of pairs, the chosen half first."""
        ids, attended, answers = (inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        rows = ids.shape[0] // 2
        counted = torch.cat([attended[:rows], answers[rows:]])
        tokens = self.token_logprobs(model, inputs, labels=ids.masked_fill(counted == 0, IGNORED))
        entropy = -tokens[:rows].sum() / attended[:rows, 1:].sum().clamp(min=1)
        mask = answers[:, 1:]
        chosen, rejected = ((tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).chunk(2)
        ratio = odds_ratio_loss(chosen, rejected)
        self.note_pairs((self.args.beta * chosen, self.args.beta * rejected), (chosen, rejected))
        self.note({"nll_loss": entropy, "log_odds_ratio": -ratio})
        return entropy + self.args.beta * ratio.mean()
