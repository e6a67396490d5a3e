"""A trainer whose data are prompts: whole groups of them, repeated for as long as their rollouts are used."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

from fastrl.trainers.checkpointing import ResumableTrainer
from fastrl.trainers.online_config import OnlineConfig
from fastrl.trainers.prompts import Example, PromptDataset
from fastrl.trainers.sampler import RepeatSampler


class PromptTrainer(ResumableTrainer):
    """Loads prompts for online methods; which prompts a step sees depends on the seed and on its number only."""

    args: OnlineConfig
    model: Any

    def __init__(self, *, train_dataset: Any, eval_dataset: Any, args: OnlineConfig, **kwargs: Any) -> None:
        super().__init__(
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=list,
            **kwargs,
        )
        self._drawn = 0  # prompts drawn besides those of the sampler
        self._window_examples: list[Any] = []  # per micro-batch of the optimizer step, the examples of its rollout
        self._window_is_new = False

    @staticmethod
    def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
        """Raises what `PromptDataset` raises, before a model is loaded."""
        if train_dataset is None:
            raise ValueError("train_dataset: needed")
        PromptDataset(train_dataset, "train_dataset")
        several = isinstance(eval_dataset, dict) and eval_dataset
        for name, rows in (eval_dataset if several else {"": eval_dataset}).items():
            if rows is not None:
                PromptDataset(rows, f"eval_dataset[{name!r}]" if name else "eval_dataset")

    def get_train_dataloader(self) -> DataLoader:
        """Loads one rollout's examples at a time, again for every micro-batch that uses the rollout."""
        return self._get_dataloader(
            dataset=self._prompts,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        args = self.args
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        prompts = args.generation_batch_size // args.num_generations
        if len(rows) < prompts:
            raise ValueError(
                f"train_dataset: {len(rows)} prompts are fewer than one rollout takes ({prompts} = "
                f"generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations})"
            )
        repeats = args.steps_per_generation * args.num_iterations
        self._sampler = RepeatSampler(rows, args.num_generations, prompts, repeats, args.shuffle_dataset, args.seed)
        return self._sampler

    @cached_property
    def _prompts(self) -> PromptDataset:
        return PromptDataset(self.train_dataset, "train_dataset", self.args.remove_unused_columns)

    def rollout_examples(self, number: int) -> list[Example]:
        """This process's examples of rollout `number` of the run, counted from 0."""
        return self._own_examples(self._sampler.batch(number))

    def draw_examples(self, prompts: int) -> list[Example]:
        """The examples of further prompts, as many for each process, `num_generations` of each.

        They go through the dataset in an order of their own, which depends on the seed and on how many were drawn.
        """
        order = RepeatSampler(self._prompts, 1, shuffle=self.args.shuffle_dataset, seed=self.args.seed + 1)
        size, places = len(self._prompts), range(self._drawn, self._drawn + prompts * self.args.world_size)
        self._drawn += len(places)
        orders = {epoch: order.order(epoch) for epoch in {place // size for place in places}}
        indices = [orders[place // size][place % size] for place in places]
        return self._own_examples([index for index in indices for _ in range(self.args.num_generations)])

    def _own_examples(self, indices: list[int]) -> list[Example]:
        share = len(indices) // self.args.world_size
        return [self._prompts[index] for index in indices[self.args.process_index * share :][:share]]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Each prompt `num_generations_eval` times, in order."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]  # type: ignore[index]
        if rows is None:
            raise ValueError("eval_dataset: evaluation needs one")
        self.args.check_eval_batch()
        return self._get_dataloader(
            dataset=PromptDataset(rows, "eval_dataset", self.args.remove_unused_columns),
            description="Evaluation",
            batch_size=self.args.eval_batch_size,
            sampler_fn=self._get_eval_sampler,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        count = self.args.num_generations_eval or self.args.num_generations
        return RepeatSampler(eval_dataset, count, shuffle=False)

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        self._sampler.set_epoch(epoch)  # accelerate's wrappers do not always pass the epoch on
        super()._run_epoch(model, epoch, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Keeps the examples of a whole optimizer step: its normalizers need all of its rollouts."""
        self._window_examples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window_is_new = True
        return self._window_examples, None

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # rows of a dataset, or rollouts that are already where they belong
