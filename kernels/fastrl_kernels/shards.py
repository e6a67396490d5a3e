"""Statistics of rows whose vocabulary comes in pieces: blocks of one weight, or the shards of a process group.

In a group each rank holds some rows of the head's weight, of any number, in rank order (Megatron's vocabulary
parallelism); only (n,) vectors are exchanged.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .head import RowStats


def merge_stats(pieces: Tensor) -> RowStats:
    """Statistics over the whole vocabulary from those of its pieces, `(3 or 4, pieces, n)` in the order of RowStats.

    Merged in fp64, so that many pieces are as good as one.
    """
    dtype, pieces = pieces.dtype, pieces.double()
    row_max = pieces[0].amax(0)
    # A piece whose logits are all -inf adds nothing (both its max and its log-sum are -inf), unless all pieces are so:
    # that is NaN, as in log_softmax.
    empty = (pieces[0] == -torch.inf) & (pieces[1] == -torch.inf)
    log_mass = torch.where(empty & (row_max != -torch.inf), -torch.inf, (pieces[0] - row_max) + pieces[1])
    peak = log_mass.amax(0)
    log_sum = peak + (log_mass - peak).exp().sum(0).log()
    log_share = log_mass - log_sum
    taken = torch.where(empty, -torch.inf, pieces[2] + log_share).amax(0)  # -inf in every piece but the token's own
    taken = torch.where(log_sum.isnan(), log_sum, taken)
    mean = None
    if pieces.shape[0] == 4:
        share = log_share.exp()
        mean = torch.where(share == 0, 0.0, share * (pieces[3] + (pieces[0] - row_max))).sum(0).to(dtype)
    return RowStats(row_max.to(dtype), log_sum.to(dtype), taken.to(dtype), mean)


def stack_stats(stats: RowStats) -> Tensor:
    """`(3 or 4, n)`: the statistics as rows of one tensor."""
    return torch.stack([x for x in stats if x is not None])


def shard_layout(weight: Tensor, group: dist.ProcessGroup) -> tuple[int, int, int]:
    """Vocabulary id of this rank's first row of the weight, size of the whole vocabulary, size of the largest shard."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=weight.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([weight.shape[0]], device=weight.device), group=group)
    counts = [int(size) for size in sizes]
    return sum(counts[: dist.get_rank(group)]), sum(counts), max(counts)


def combine_shards(stats: RowStats, group: dist.ProcessGroup) -> RowStats:
    """Statistics over the whole vocabulary from each rank's own; the same bits on every rank."""
    local = stack_stats(stats)
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    return merge_stats(torch.stack(gathered, 1))
