"""Log-probabilities of the tokens of a batch under a model, without whole logits.

The model runs as ever, but for its logits it is asked for the last position only. The hidden states before the head
are taken on the way, and :func:`unsloth.kernels.logprobs.logprobs` computes the head at the positions that count, in
chunks.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig

from unsloth.core.log import get_logger
from unsloth.data.masking import IGNORED
from unsloth.kernels.logprobs import logprobs
from unsloth.kernels.softmax_rows import HeadOptions, transform_logits
from unsloth.layers import fused_head, packed_attention
from unsloth.models import record
from unsloth.train.packed_rows import PackedRows

# Legend: B sequences, T tokens of the longest, N positions that count, H hidden, V vocabulary.

logger = get_logger(__name__)


@dataclass(frozen=True)
class Scores:
    """What the model says of the labels of a batch; zero where a label does not count.

    Attributes:
        logprobs: (B, T - 1), at position t that of label t + 1.
        entropy: (B, T - 1), of the distribution that label t + 1 is one of; None unless asked for.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


class TokenLogprobs:
    """Computes log-probabilities of labels under one model.

    Whether head and log-probabilities can be taken apart from the model is read off its configuration (scale and soft
    cap of the logits) and then tried: at the first batch the head, applied here to the hidden states, must give the
    logits that the model itself gives at the last position. Where it does not, whole logits are used, and the log says
    so.

    Args:
        model: The model, with or without adapters.
        chunked: False for whole logits.
    """

    def __init__(self, model: nn.Module, chunked: bool = True) -> None:
        self._model = model
        self._inner = record.transformers_model(model)
        self._options = head_options(self._inner.config)
        self.chunked = chunked and self._can_be_chunked()
        self._tried = False
        self._counted: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def packs(self) -> bool:
        """Whether the model tells rows that are laid end to end apart, and branches of them."""
        configs = self._model.peft_config.values() if isinstance(self._model, PeftModel) else ()
        if not self.chunked or any(config.is_prompt_learning for config in configs):
            return False
        return self._inner.config._attn_implementation == packed_attention.NAME

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        packed: PackedRows | None = None,
    ) -> torch.Tensor:
        """Log-probability of every label; to be called under the autocast of the run.

        Args:
            model: What to call: the model, or a wrapper around it.
            inputs: Its arguments, of shape (B, T).
            labels: (B, T), not shifted; ``IGNORED`` marks those that do not count. Which do is found once for calls in
                a row with the same tensor, before the model is called: a GPU waits for it.
            packed: The inputs as one row, to be computed in their place.

        Returns:
            (B, T - 1) of float32 (float64 for a model of that dtype), at position t that of label t + 1; zero where
            it does not count.
        """
        return self.scores(model, inputs, labels, packed).logprobs

    def scores(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        packed: PackedRows | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        entropy_grad: bool = False,
    ) -> Scores:
        """As ``__call__``, with more of each distribution.

        Args:
            model: As there.
            inputs: As there.
            labels: As there.
            packed: As there.
            temperature: Divides the logits.
            entropy: Whether to compute the entropy as well.
            entropy_grad: Whether it is differentiated.
        """
        targets = labels[:, 1:]
        options = dataclasses.replace(self._options, temperature=temperature)
        entropy = entropy or entropy_grad
        if self.chunked:
            found = self._from_hidden(model, inputs, labels, packed, options, entropy, entropy_grad)
            if found is not None:
                return found
        logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] : -1]
        wide = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        every = wide.log_softmax(-1)
        counts = targets != IGNORED
        chosen = torch.where(counts, every.gather(-1, targets.clamp(min=0)[..., None])[..., 0], 0.0)
        spread = torch.where(counts, -(every.exp() * every).sum(-1), 0.0) if entropy else None
        return Scores(chosen, spread if spread is None or entropy_grad else spread.detach())

    def _from_hidden(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        packed: PackedRows | None,
        options: HeadOptions,
        entropy: bool,
        entropy_grad: bool,
    ) -> Scores | None:
        """As ``__call__``; None if the model's head turns out to do more than is known of it."""
        targets, places = labels[:, 1:], self._places(labels)
        seen: list[torch.Tensor] = []
        hook = self._inner.base_model.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        if packed is not None:
            inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
        try:
            # an index, not 1: for a slice, whose rows have gaps between them, a CPU copies the head once a row
            last = torch.tensor([-1], device=inputs["input_ids"].device)
            last_logits = model(**inputs, use_cache=False, logits_to_keep=last).logits
        finally:
            hook.remove()
        hidden = seen[-1]
        head = self._inner.get_output_embeddings()
        if not self._tried and not self._head_is_known(hidden, head, last_logits):
            return None
        if packed is None:
            first = hidden.shape[1] - labels.shape[1]  # prompt learning puts its own tokens in front
            scored = hidden[places // targets.shape[1], first + places % targets.shape[1]]
        else:
            scored = hidden[0, packed.index[:, :-1].flatten()[places]]
        found = logprobs(
            scored,
            head.weight,
            targets.flatten()[places],
            getattr(head, "bias", None),
            options=options,
            entropy=entropy,
            entropy_grad=entropy_grad,
            chunk_bytes=fused_head.chunk_bytes(fused_head.keeper_of(self._inner), scored, head.weight),
        )
        chosen, spread = (
            None if values is None else values.new_zeros(targets.numel()).scatter(0, places, values).view(targets.shape)
            for values in (found.logprobs, found.entropy)
        )
        assert chosen is not None
        return Scores(chosen, spread)

    def _places(self, labels: torch.Tensor) -> torch.Tensor:
        """(N,) where in the flattened (B, T - 1) targets those that count are."""
        if self._counted is None or self._counted[0] is not labels:
            self._counted = labels, (labels[:, 1:] != IGNORED).flatten().nonzero().flatten()
        return self._counted[1]

    def _can_be_chunked(self) -> bool:
        head = self._inner.get_output_embeddings()
        if head is None or isinstance(head, BaseTunerLayer) or self._inner.base_model is self._inner:
            return False
        weight = getattr(head, "weight", None)
        if weight is None or not weight.is_floating_point():
            return False
        return "logits_to_keep" in inspect.signature(type(self._inner).forward).parameters

    @torch.no_grad()
    def _head_is_known(self, hidden: torch.Tensor, head: nn.Module, expected: torch.Tensor) -> bool:
        """Compare our logits of the last position with the model's; both (B, 1, V)."""
        self._tried = True
        raw = nn.functional.linear(hidden[:, [-1]], head.weight, getattr(head, "bias", None))  # type: ignore[arg-type]
        found = transform_logits(raw, self._options).float()
        # Two ways through one head differ by rounding; a scale or cap that is not known of differs by much more.
        if found.shape == expected.shape and (found - expected).norm() <= 0.02 * expected.float().norm():
            return True
        logger.info(
            "the head of %s does more to its logits than is known here: log-probabilities are computed from whole "
            "logits",
            type(self._inner).__name__,
        )
        self.chunked = False
        return False


def head_options(config: PreTrainedConfig) -> HeadOptions:
    """What a model does to its logits, as far as its configuration says: scale and soft cap, as transformers has them.

    Cohere multiplies by ``logit_scale``, Falcon-H1 by ``lm_head_multiplier``, Granite divides by ``logits_scaling``,
    Gemma caps at ``final_logit_softcapping``.
    """
    text = config.get_text_config()
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(text, name, None)) is not None
        ),
        None,
    )
    divisor = getattr(text, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return HeadOptions(
        logit_scale=1.0 if scale is None else scale, softcap=getattr(text, "final_logit_softcapping", None) or 0.0
    )
