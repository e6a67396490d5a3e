"""Statistics of rows whose vocabulary is sharded over the ranks of a group (Megatron's vocabulary parallelism).

Each rank holds some rows of the head's weight, of any number, in rank order; only (n,) vectors are exchanged.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .head import RowStats


def shard_start(weight: Tensor, group: dist.ProcessGroup) -> tuple[int, int]:
    """Vocabulary id of this rank's first row of the weight, and the size of the whole vocabulary."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=weight.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([weight.shape[0]], device=weight.device), group=group)
    counts = [int(size) for size in sizes]
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def combine_shards(stats: RowStats, group: dist.ProcessGroup) -> RowStats:
    """Statistics over the whole vocabulary from each rank's own; the same bits on every rank.

    With w_s the probability mass of shard s, H = sum_s w_s (H_s - log w_s): the shards' supports are disjoint.
    """
    local = torch.stack([x for x in stats if x is not None])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    shards = torch.stack(gathered, 1)  # (statistic, shard, n)
    row_max = shards[0].amax(0)
    below = shards[0] - row_max  # <= 0
    log_mass = below + shards[1]
    peak = log_mass.amax(0)
    log_sum = peak + (log_mass - peak).exp().sum(0).log()
    log_share = log_mass - log_sum
    taken = (shards[2] + log_share).amax(0)  # -inf in every shard but the token's own
    taken = torch.where(log_sum.isnan(), log_sum, taken)
    entropy = None
    if stats.entropy is not None:
        share = log_share.exp()
        entropy = torch.where(share > 0, share * (shards[3] - log_share), share).sum(0)
    return RowStats(row_max, log_sum, taken, entropy)
