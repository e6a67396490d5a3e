"""RepeatSampler: complete groups, repeats, and an order that a resumed run can find again."""

import pytest

from fastrl.trainers.sampler import RepeatSampler


def test_order_without_shuffling() -> None:
    sampler = RepeatSampler(range(5), mini_repeat_count=2, batch_size=2, repeat_count=2, shuffle=False)
    assert list(sampler) == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]  # 4 would start a partial batch
    assert len(sampler) == 16


@pytest.mark.parametrize(("samples", "batch"), [(7, 3), (6, 3), (2, 3), (0, 1), (1, 1)])
def test_shuffled_groups_are_complete(samples: int, batch: int) -> None:
    sampler = RepeatSampler(range(samples), mini_repeat_count=3, batch_size=batch, repeat_count=2, seed=5)
    order = list(sampler)
    assert len(order) == len(sampler) == samples // batch * batch * 6
    size = batch * 3
    rollouts = [order[start : start + size] for start in range(0, len(order), size)]
    for first, again in zip(rollouts[::2], rollouts[1::2], strict=True):
        assert first == again
        assert all(len(set(first[i : i + 3])) == 1 for i in range(0, size, 3))
        assert len(set(first)) == batch


def test_order_is_a_function_of_seed_and_epoch() -> None:
    sampler, other = (RepeatSampler(range(50), 1, seed=3) for _ in range(2))
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and sorted(second) == sorted(first)
    other.set_epoch(1)  # as after a resume: never iterated in epoch 0
    assert list(other) == second
    assert list(RepeatSampler(range(50), 1, seed=4)) not in (first, second)
