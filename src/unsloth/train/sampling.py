"""The order of the rows, as a function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from unsloth.train import randomness


class EpochSampler(Sampler[int]):
    """Makes a sampler that draws from the global generator repeatable: a resumed epoch has the order it began with.

    Args:
        sampler: The sampler to repeat.
        seed: Together with the epoch, it decides the order.
    """

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass belongs to; the trainer's data loader calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        with randomness.undisturbed():
            torch.default_generator.manual_seed(self.seed + self.epoch)
            order = list(self.sampler)
        return iter(order)

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        return len(self.sampler)


class RepeatedEpochs(Sampler[int]):
    """TRL's sampler of prompts, each repeated for its group, made repeatable: an epoch's order depends on its number.

    Args:
        sampler: It draws from a generator of its own, which a resumed run would begin anew.
    """

    def __init__(self, sampler: RepeatSampler) -> None:
        self.sampler = sampler
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass belongs to; the trainer's data loader calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed((self.sampler.seed or 0) + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
