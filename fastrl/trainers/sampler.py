"""The order of prompts: whole groups, repeated for as long as one batch of rollouts is used."""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """Yields each index `mini_repeat_count` times in a row, `batch_size` indices at a time, each such batch
    `repeat_count` times before the next. A last batch that is not full is dropped, so that groups are complete.

    Semantics of TRL's sampler of that name, except that the order of an epoch is a function of (seed, epoch) alone.
    TRL draws it from one generator that runs on, so that a run resumed in its second epoch sees the first one's order.

        RepeatSampler(range(5), mini_repeat_count=2, batch_size=2, repeat_count=2, shuffle=False)
        0 0 1 1  0 0 1 1  2 2 3 3  2 2 3 3
    """

    def __init__(
        self,
        data_source: Sized,
        mini_repeat_count: int,
        batch_size: int = 1,
        repeat_count: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.num_samples = len(data_source)
        self.mini_repeat_count = mini_repeat_count
        self.batch_size = batch_size
        self.repeat_count = repeat_count
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """Every index once, as that epoch has them."""
        if not self.shuffle:
            return list(range(self.num_samples))
        # A product with a large odd number keeps (seed, epoch) and (seed + 1, epoch - 1) apart.
        generator = torch.Generator().manual_seed(self.seed + 0x9E3779B1 * epoch)
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def batch(self, number: int) -> list[int]:
        """Batch `number` of all epochs, counted from 0, once."""
        epoch, place = divmod(number, self.num_samples // self.batch_size)
        indices = self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        return [index for index in indices for _ in range(self.mini_repeat_count)]

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        for start in range(0, self.num_samples - self.batch_size + 1, self.batch_size):
            for _ in range(self.repeat_count):
                for index in order[start : start + self.batch_size]:
                    yield from [index] * self.mini_repeat_count

    def __len__(self) -> int:
        return self.num_samples // self.batch_size * self.batch_size * self.mini_repeat_count * self.repeat_count
