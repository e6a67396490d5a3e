"""The chunk engine: what runs between the row kernels. Never holds more logits than one chunk of rows.

GEMMs are the vendor's; a chunk's tile of logits is reused in place for its gradient and by the next chunk. dW is summed
in the accumulation dtype (fp32, or fp64 for fp64) over all chunks and rounded to the weight's dtype once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import Backend
from .head import LogitTransform, RowStats, accumulation_dtype
from .shards import combine_shards, merge_stats, stack_stats

# Bytes of one tile of logits, and the fewest rows it may hold: under them the GEMMs of the backward only stream dW.
TILE_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}
MIN_ROWS = 128
# Weight rows per GEMM on the CPU. With D in the hundreds MKL is a fifth faster on such blocks than on the whole
# vocabulary (measured: Zen 4, D 576 and 896), and a half-precision weight, for which the CPU has no GEMM with fp32
# results, is widened one block at a time.
CPU_BLOCK = 1024
# Rows scored at a time on the CPU: scoring needs no whole row in memory, so a block of columns serves many rows.
CPU_SCORE_ROWS = 2048

Rows = slice | Tensor  # a run of rows, or an index of rows


class Gradients(NamedTuple):
    """Gradients of the inputs; an empty tensor where it was not asked for."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)


class Needs(NamedTuple):
    """Which inputs want a gradient. What is not needed is neither computed nor allocated."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Head:
    """The LM head and the rows that pass through it; everything a chunk's GEMMs and row passes need."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D); with tensor parallelism this rank's vocabulary shard
    bias: Tensor | None  # (V,)
    ids: Tensor  # (N,) int64
    transform: LogitTransform
    backend: Backend
    widest: int  # rows of the weight, or of the group's largest shard: every rank must cut the same chunks
    group: dist.ProcessGroup | None = None  # vocabulary-parallel group
    first_id: int = 0  # vocabulary id of weight[0]: not 0 in the later shards of a group

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.weight.dtype)

    def most_rows(self) -> int:
        """Rows of a tile that holds whole rows of logits."""
        row_bytes = self.widest * self.dtype.itemsize
        budget = TILE_BYTES.get(self.hidden.device.type, TILE_BYTES["cpu"])
        return max(MIN_ROWS, budget // row_bytes // 64 * 64)

    def tile_chunks(self, rows: Tensor | None, most: int, columns: int) -> Iterator[tuple[Rows, Tensor]]:
        """The given rows (None: all) in even chunks of at most `most`, each with its part of one tile (n, columns)."""
        total = self.ids.shape[0] if rows is None else rows.shape[0]
        if total == 0:
            return
        size = -(-total // -(-total // most))
        # Rows start at multiples of 64 bytes, so that a GPU's loads stay wide for any vocabulary.
        stride = columns if self.hidden.device.type == "cpu" else -(-columns // 16) * 16
        tile = self.hidden.new_empty(size, stride, dtype=self.dtype)[:, :columns]
        for start in range(0, total, size):
            end = min(start + size, total)
            yield (slice(start, end) if rows is None else rows[start:end]), tile[: end - start]

    def project(self, x: Tensor, tile: Tensor) -> None:
        """GEMM1: tile = x @ weight.T, in the accumulation dtype."""
        if x.device.type == "cpu":
            x = x.to(self.dtype)
            for start in range(0, self.weight.shape[0], CPU_BLOCK):
                block = slice(start, start + CPU_BLOCK)
                torch.mm(x, self.weight[block].to(self.dtype).t(), out=tile[:, block])
        elif self.weight.dtype == self.dtype:
            torch.mm(x, self.weight.t(), out=tile)
        else:
            torch.mm(x, self.weight.t(), out_dtype=self.dtype, out=tile)

    def local_ids(self, rows: Rows) -> Tensor:
        """ids of some rows, relative to this rank's shard; -1 where the token is in another one."""
        ids = _take(self.ids, rows)
        if self.group is None:
            return ids
        local = ids - self.first_id
        return torch.where((local >= 0) & (local < self.weight.shape[0]), local, -1)

    def stats(self, x: Tensor, ids: Tensor, tile: Tensor, entropy: bool) -> RowStats:
        """GEMM1 and row pass 1 of a chunk, combined over the vocabulary shards; leaves the logits in the tile."""
        self.project(x, tile)
        stats = self.backend.row_stats(tile, ids, self.transform, self.bias, entropy)
        return stats if self.group is None else combine_shards(stats, self.group)

    def streamed_stats(self, x: Tensor, ids: Tensor, tile: Tensor, entropy: bool) -> RowStats:
        """The same through a tile of few columns, which the next block of columns overwrites."""
        pieces = []
        columns = tile.shape[1]
        for start in range(0, self.weight.shape[0], columns):
            block = slice(start, start + columns)
            weight = self.weight[block].to(self.dtype)
            logits = tile[:, : weight.shape[0]]
            torch.mm(x.to(self.dtype), weight.t(), out=logits)
            local = ids - start
            local = torch.where((local >= 0) & (local < weight.shape[0]), local, -1)
            bias = None if self.bias is None else self.bias[block]
            pieces.append(stack_stats(self.backend.row_stats(logits, local, self.transform, bias, entropy)))
        stats = merge_stats(torch.stack(pieces, 1))
        return stats if self.group is None else combine_shards(stats, self.group)


class _Accumulator:
    """Sums the gradients of the chunks; the first chunk writes dW instead of adding to it."""

    def __init__(self, head: Head, needs: Needs):
        self.head, self.needs = head, needs
        like = head.hidden
        self.hidden = torch.zeros_like(like) if needs.hidden else like.new_empty(0)
        self.weight: Tensor | None = None
        v = head.weight.shape[0]
        self.bias = like.new_zeros(v, dtype=head.dtype) if needs.bias else like.new_empty(0)
        # Tensor cores take half-precision operands; the CPU's row kernels work in place on the tile.
        self.half = head.weight.dtype != head.dtype and like.device.type == "cuda"
        self.half_tile = like.new_empty(0, dtype=head.weight.dtype)

    def gradient_tile(self, tile: Tensor) -> Tensor:
        """Where row pass 2 writes: the tile itself, or on CUDA a half-precision tile for half-precision weights."""
        if not self.half:
            return tile
        if self.half_tile.shape[0] < tile.shape[0]:
            self.half_tile = torch.empty_strided(
                tile.shape, (tile.stride(0), 1), dtype=self.head.weight.dtype, device=tile.device
            )
        return self.half_tile[: tile.shape[0]]

    def add(self, dtile: Tensor, x: Tensor, rows: Rows) -> None:
        """GEMM2 and GEMM3 of a chunk: dtile (k, V) is the gradient of the products of the rows x (k, D)."""
        weight, dtype = self.head.weight, self.head.dtype
        if self.needs.hidden:
            if weight.dtype == dtile.dtype:
                if isinstance(rows, slice) and self.hidden.dtype == dtile.dtype:
                    torch.mm(dtile, weight, out=self.hidden[rows])
                else:
                    self.hidden[rows] = torch.mm(dtile, weight).to(self.hidden.dtype)
            else:
                dx = dtile.new_zeros(x.shape)
                for start in range(0, weight.shape[0], CPU_BLOCK):
                    block = slice(start, start + CPU_BLOCK)
                    dx.addmm_(dtile[:, block], weight[block].to(dtype))
                self.hidden[rows] = dx.to(self.hidden.dtype)
        if self.needs.weight:
            if self.half:
                if self.weight is None:
                    self.weight = weight.new_zeros(weight.shape, dtype=dtype)
                torch.addmm(self.weight, dtile.t(), x, out_dtype=dtype, out=self.weight)
            elif self.weight is None:
                self.weight = torch.mm(dtile.t(), x.to(dtype))
            else:
                self.weight.addmm_(dtile.t(), x.to(dtype))
        if self.needs.bias:
            self.bias += dtile.sum(0, dtype=dtype)

    def finish(self) -> Gradients:
        head = self.head
        weight = head.hidden.new_empty(0, dtype=head.weight.dtype)
        if self.needs.weight:
            weight = torch.zeros_like(head.weight) if self.weight is None else self.weight.to(head.weight.dtype)
        if head.group is not None and self.needs.hidden:
            dist.all_reduce(self.hidden, group=head.group)  # each rank holds its shard's share of dX
        bias = self.bias if head.bias is None or not self.needs.bias else self.bias.to(head.bias.dtype)
        return Gradients(self.hidden, weight, bias)


def _take(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _write(out: RowStats, rows: Rows, stats: RowStats) -> None:
    for whole, part in zip(out, stats, strict=True):
        if whole is not None and part is not None:
            whole[rows] = part


def _empty_stats(head: Head, entropy: bool) -> RowStats:
    def zeros() -> Tensor:
        return head.hidden.new_zeros(head.ids.shape[0], dtype=head.dtype)

    return RowStats(zeros(), zeros(), zeros(), zeros() if entropy else None)


def score(head: Head, rows: Tensor | None, entropy: bool, out: RowStats | None = None) -> RowStats:
    """Statistics of the given rows (None: all), 0 elsewhere. 2NDV FLOPs and one tile of memory."""
    out = _empty_stats(head, entropy) if out is None else out
    if head.hidden.device.type == "cpu":
        most, columns, stats = CPU_SCORE_ROWS, min(CPU_BLOCK, head.weight.shape[0]), head.streamed_stats
    else:
        most, columns, stats = head.most_rows(), head.weight.shape[0], head.stats
    for part, tile in head.tile_chunks(rows, most, columns):
        _write(out, part, stats(_take(head.hidden, part), head.local_ids(part), tile, entropy))
    return out


def backward(
    head: Head,
    stats: RowStats,  # of all N rows, as score returned them
    rows: Tensor | None,  # the rows that carry a gradient (None: all)
    grad_logps: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    grad_lse: Tensor | None,  # (N,)
    needs: Needs,
) -> Gradients:
    """Gradients of the inputs from those of the statistics; recomputes the logits: 6NDV FLOPs over the given rows."""
    total = _Accumulator(head, needs)
    mean = stats.mean if grad_entropy is not None else None
    for part, tile in head.tile_chunks(rows, head.most_rows(), head.weight.shape[0]):
        x = _take(head.hidden, part)
        head.project(x, tile)
        out = total.gradient_tile(tile)
        row_max, log_sum, row_mean, g_logps, g_entropy, g_lse = (
            None if v is None else _take(v, part)
            for v in (stats.row_max, stats.log_sum, mean, grad_logps, grad_entropy, grad_lse)
        )
        head.backend.row_grad(
            tile, out, head.local_ids(part), head.transform, head.bias,
            row_max, log_sum, row_mean, g_logps, g_entropy, g_lse, None, None,  # type: ignore[arg-type]
        )  # fmt: skip
        total.add(out, x, part)
    return total.finish()


def pack(alive: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Moves (source, target), each (k,), that bring the k alive rows to the front.

    Alive rows behind the first k go into the dead slots before it; so no row is written that another move reads.
    """
    target = torch.arange(k)
    source = target.clone()
    source[~alive[:k]] = alive[k:].nonzero().squeeze(-1) + k
    return source, target


# (rows, logps, entropy) of a chunk -> per-token loss, d loss / d logps, d loss / d entropy
Coefficients = Callable[[Rows, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


def single_pass(
    head: Head,
    live: Tensor | None,  # rows that may carry a gradient (None: all)
    dead: Tensor | None,  # further rows to score only, or None
    coefficients: Coefficients,
    entropy: bool,
    needs: Needs,
) -> tuple[Tensor, RowStats, Gradients]:
    """Loss terms (N,), statistics and gradients of a token-local objective: each chunk is finished before the next.

    A live row whose coefficients come out exactly 0 (clipped, say) costs its logits and nothing more on the CPU: row
    pass 2 packs the other rows to the front of the tile while it writes their gradient, so the GEMMs see only those.
    """
    stats = _empty_stats(head, entropy)
    terms = torch.zeros_like(stats.logps)
    total = _Accumulator(head, needs)
    for part, tile in head.tile_chunks(live, head.most_rows(), head.weight.shape[0]):
        x, ids = _take(head.hidden, part), head.local_ids(part)
        chunk = head.stats(x, ids, tile, entropy)
        _write(stats, part, chunk)
        terms[part], grad_logps, grad_entropy = coefficients(part, chunk.logps, chunk.entropy)
        if not any(needs):
            continue
        source = target = None
        if head.hidden.device.type == "cpu":  # on a GPU the count would stall the queue at every chunk
            alive = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
            k = int(alive.sum())
            if k == 0:
                continue
            if k < x.shape[0]:
                source, target = pack(alive, k)
                x = x.index_select(0, source)
                part = part.start + source if isinstance(part, slice) else part.index_select(0, source)
        out = total.gradient_tile(tile[: x.shape[0]])
        head.backend.row_grad(
            tile, out, ids, head.transform, head.bias, chunk.row_max, chunk.log_sum,
            chunk.mean if grad_entropy is not None else None, grad_logps, grad_entropy, None, source, target,
        )  # fmt: skip
        total.add(out, x, part)
    if dead is not None:
        score(head, dead, entropy, stats)
    return terms, stats, total.finish()
