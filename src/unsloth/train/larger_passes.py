"""Batches of one update that go through the model together, where memory allows: small passes leave a GPU idle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

from unsloth.memory import checkpointing, gauge
from unsloth.models import plan, record
from unsloth.train import block_memory
from unsloth.train.packed_rows import filled_length

# Legend: B completions of a pass, P tokens of the longest prompt, C of the longest completion.

TOKENS = 32768
"""Of a pass, at most: an H100 then works for longer than Python takes to launch, on models from one billion weights."""
_SHARE = 0.5
"""Of the free memory, for a pass: gradients and states of the optimizer may be yet to come."""
_ADDS_UP = ("grpo", "dr_grpo", "dapo")
_OF_PROMPTS = ("prompt_ids", "prompt_mask")

Batch = dict[str, Any]


class LargerPasses(TRLTrainer):
    """Computes consecutive batches as one, before TRL's class.

    Only batches that gradients are accumulated over anyway, and losses whose gradient is the sum of those of their
    parts: updates stay what they were, up to rounding. The first batch of those that are computed together stands for
    them all, the others are empty and their loss is 0.
    """

    _buffered_inputs: list[Batch] | None
    _policy: Any
    _packing: bool
    _covered = 0
    """Batches from here on that an earlier pass has computed already."""
    _since_update = 0
    """Batches of this update that are over."""

    def _next_pass(self) -> Batch:
        """The batches that are computed now; empty where an earlier pass had this one in it."""
        assert self._buffered_inputs is not None
        place = self._step % self.args.steps_per_generation
        last, over = self.accelerator.sync_gradients, self._since_update
        self._since_update = 0 if last else over + 1
        if self._covered:
            self._covered -= 1
            return {}
        rest = self._buffered_inputs[place : place + max(1, self.current_gradient_accumulation_steps - over)]
        count = self._together(rest)
        self._covered = count - 1
        return _trimmed(_joined(rest[:count]))

    def _forget_passes(self) -> None:
        """Begin with a whole update."""
        self._covered = self._since_update = 0

    def _together(self, batches: Sequence[Batch]) -> int:
        """How many of ``batches``, from the first, are computed as one."""
        adds_up = self.args.uses_our_loss and self.args.loss_type in _ADDS_UP and not self.aux_loss_enabled
        most = self._most_tokens()
        if not most or len(batches) < 2 or not adds_up or "pixel_values" in batches[0]:
            return 1
        tokens = self._tokens(batches)
        passes = -(-sum(tokens) // most)
        count = -(-len(batches) // passes)  # rather passes of the same size than a small one at the end
        while count > 1 and (sum(tokens[:count]) > most or not self._fits(sum(tokens[:count]))):
            count -= 1
        return count

    def _most_tokens(self) -> int:
        """Of a pass; 0 where batches stay apart."""
        if self.accelerator.num_processes > 1:
            return 0
        if self.args.tokens_per_pass is not None:
            return self.args.tokens_per_pass
        known = self._packing and self._policy.packs  # otherwise memory goes by other rules
        return TOKENS if known and self.accelerator.device.type == "cuda" else 0

    def _fits(self, tokens: int) -> bool:
        """Whether a pass of so many takes no more memory than it may."""
        if self.args.tokens_per_pass is not None:
            return True
        made, model = plan.installed(self.model), record.transformers_model(self.model)
        blocks = None if made is None else block_memory.find(made, model)
        if blocks is None:  # which memory it takes is not known
            return False
        now, policy = gauge.read(self.accelerator.device), checkpointing.policy_in(model)
        free = int(_SHARE * (now.total - now.allocated))
        vocabulary = model.config.get_text_config().vocab_size
        return block_memory.fits(blocks, policy, filled_length(tokens), model.dtype.itemsize, vocabulary, free)

    def _rows_at_once(self, ids: torch.Tensor, batch_size: int | None) -> int:
        """Rows of ``ids`` that go through the model together where nothing is differentiated.

        A quarter of the tokens, since the inner values of a whole layer exist at once there.
        """
        rows, width = ids.shape
        if batch_size is None or torch.is_grad_enabled():
            return batch_size or rows
        return max(batch_size, self._most_tokens() // 4 // max(width, 1))

    def _tokens(self, batches: Sequence[Batch]) -> list[int]:
        """Of each, as they go through the model."""
        if not (self._packing and self._policy.packs):
            return [batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in batches]
        prompts = torch.stack([batch["prompt_mask"].sum() for batch in batches])
        completions = torch.stack([batch["completion_mask"].sum() for batch in batches])
        return (completions + prompts // self.num_generations).tolist()


def _joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one generation, whose columns are all as wide, as one."""
    if len(batches) == 1:
        return batches[0]

    def join(values: Sequence[Any]) -> Any:
        first = values[0]
        if torch.is_tensor(first) and first.dim():
            return torch.cat(list(values))
        return [entry for value in values for entry in value] if isinstance(first, list) else first

    return {name: join([batch[name] for batch in batches]) for name in batches[0]}


def _trimmed(batch: Batch) -> Batch:
    """A batch without the columns in which it has only padding, in front of prompts and after completions."""
    prompt, completion = batch["prompt_mask"], batch["completion_mask"]
    longest_prompt, longest = torch.stack([prompt.sum(1).max(), completion.sum(1).max()]).tolist()
    width = completion.shape[1]

    def cut(name: str, value: Any) -> Any:
        if not torch.is_tensor(value) or value.dim() < 2:
            return value
        if name in _OF_PROMPTS:
            return value[:, -max(longest_prompt, 1) :]
        return value[:, : max(longest, 1)] if value.shape[1] == width else value

    return {name: cut(name, value) for name, value in batch.items()}
