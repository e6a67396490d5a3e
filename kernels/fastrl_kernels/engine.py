"""The chunk engine: what runs between the row kernels. Never holds more logits than the planner allows.

GEMMs are the vendor's; a chunk's tile of logits is reused in place for its gradient and by the next chunk. dW is summed
in the accumulation dtype (fp32, or fp64 for fp64) over all chunks and rounded to the weight's dtype once, at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import Backend
from .head import LogitTransform, RowStats, accumulation_dtype
from .planner import Plan, native_half
from .shards import combine_shards, merge_stats, stack_stats

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
    group: dist.ProcessGroup | None = None  # vocabulary-parallel group
    first_id: int = 0  # vocabulary id of weight[0]: not 0 in the later shards of a group
    # (N,) bool, or None. Given where no row may be picked (a captured graph has fixed shapes): all rows run, and those
    # outside it as rows of zeros, so that whatever they hold stays out of dW.
    inside: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype."""
        return accumulation_dtype(self.weight.dtype)

    def rows(self, part: Rows) -> Tensor:
        """Hidden states of some rows, (n, D)."""
        x = _take(self.hidden, part)
        return x if self.inside is None else x.masked_fill(~_take(self.inside, part).unsqueeze(-1), 0.0)

    def local_ids(self, part: Rows) -> Tensor:
        """ids of some rows, relative to this rank's shard; -1 where the token is in another one."""
        ids = _take(self.ids, part)
        if self.inside is not None:
            ids = ids.masked_fill(~_take(self.inside, part), 0)
        if self.group is None:
            return ids
        local = ids - self.first_id
        return torch.where((local >= 0) & (local < self.weight.shape[0]), local, -1)

    def project(self, x: Tensor, tile: Tensor, block: int) -> None:
        """GEMM1: tile = x @ weight.T, over `block` rows of the weight at a time on the CPU."""
        dtype = tile.dtype
        if x.device.type == "cpu":
            x = x.to(dtype)
            for start in range(0, self.weight.shape[0], block):
                part = slice(start, start + block)
                torch.mm(x, self.weight[part].to(dtype).t(), out=tile[:, part])
        elif self.weight.dtype == dtype:
            torch.mm(x, self.weight.t(), out=tile)
        else:
            torch.mm(x, self.weight.t(), out_dtype=dtype, out=tile)

    def reduce(self, tile: Tensor, ids: Tensor, entropy: bool) -> RowStats:
        """Row pass 1 of a projected chunk, combined over the vocabulary shards."""
        return self._combine(self.backend.row_stats(tile, ids, self.transform, self.bias, entropy))

    def streamed_stats(self, x: Tensor, ids: Tensor, tile: Tensor, entropy: bool, block: int) -> RowStats:
        """GEMM1 and row pass 1 through a tile of few columns, which the next columns overwrite."""
        pieces = []
        columns = tile.shape[1]
        for start in range(0, self.weight.shape[0], columns):
            part = slice(start, start + columns)
            head = replace(self, weight=self.weight[part])
            logits = tile[:, : head.weight.shape[0]]
            head.project(x, logits, block)
            local = ids - start
            local = torch.where((local >= 0) & (local < head.weight.shape[0]), local, -1)
            bias = None if self.bias is None else self.bias[part]
            pieces.append(stack_stats(self.backend.row_stats(logits, local, self.transform, bias, entropy)))
        return self._combine(merge_stats(torch.stack(pieces, 1)))

    def fused_stats(self, x: Tensor, ids: Tensor, entropy: bool) -> RowStats:
        """Both in one kernel of the backend: the logits never leave the chip."""
        fused = self.backend.linear_row_stats  # type: ignore[attr-defined]  # not every backend has one
        return self._combine(fused(x, self.weight, ids, self.transform, self.bias, entropy))

    def _combine(self, stats: RowStats) -> RowStats:
        return stats if self.group is None else combine_shards(stats, self.group)


def _tiles(head: Head, plan: Plan, dtype: torch.dtype) -> list[Tensor]:
    """The plan's tiles, each (chunk_rows, columns)."""
    columns = min(plan.columns, head.weight.shape[0])
    # Rows start at multiples of 64 bytes, so that a GPU's loads stay wide for any vocabulary.
    stride = columns if head.hidden.device.type == "cpu" else -(-columns // 32) * 32
    return [head.hidden.new_empty(plan.chunk_rows, stride, dtype=dtype)[:, :columns] for _ in range(plan.lanes)]


def _chunks(head: Head, rows: Tensor | None, plan: Plan) -> Iterator[tuple[int, Rows]]:
    """Number of each chunk and its rows (of the given ones; None: of all)."""
    total = head.ids.shape[0] if rows is None else rows.shape[0]
    for number, start in enumerate(range(0, total, max(plan.chunk_rows, 1))):
        end = min(start + plan.chunk_rows, total)
        yield number, slice(start, end) if rows is None else rows[start:end]


class _Accumulator:
    """Sums the gradients of the chunks; the first chunk writes dW instead of adding to it."""

    def __init__(self, head: Head, needs: Needs, plan: Plan, into: Tensor | None = None):
        self.head, self.needs, self.plan = head, needs, plan
        like = head.hidden
        self.hidden = torch.zeros_like(like) if needs.hidden else like.new_empty(0)
        self.weight = into  # a caller's buffer (V, D) in the accumulation dtype, or None: made by the first chunk
        v = head.weight.shape[0]
        self.bias = like.new_zeros(v, dtype=head.dtype) if needs.bias else like.new_empty(0)
        # Tensor cores take half-precision operands; the CPU's row kernels work in place on the tile.
        self.half = head.weight.dtype != plan.tile_dtype and like.device.type == "cuda"
        self.half_tiles = _tiles(head, plan, head.weight.dtype) if self.half else []

    def gradient_tile(self, tile: Tensor, lane: int) -> Tensor:
        """Where row pass 2 writes: the tile itself, or on CUDA a half-precision tile for half-precision weights."""
        return self.half_tiles[lane][: tile.shape[0]] if self.half else tile

    def add(self, dtile: Tensor, x: Tensor, rows: Rows) -> None:
        """GEMM2 and GEMM3 of a chunk: dtile (k, V) is the gradient of the products of the rows x (k, D); used up."""
        if self.needs.bias:
            self.bias += dtile.sum(0, dtype=self.head.dtype)
        if self.needs.weight:
            self._add_weight(dtile, x)
        if self.needs.hidden:
            self._add_hidden(dtile, rows)

    def _add_hidden(self, dtile: Tensor, rows: Rows) -> None:
        weight = self.head.weight
        if weight.dtype != dtile.dtype and native_half(dtile.device, weight.dtype):
            dtile = _narrowed(dtile, weight.dtype)  # as tensor cores take it; the sum over V stays in fp32
        if weight.dtype == dtile.dtype:
            if isinstance(rows, slice) and self.hidden.dtype == dtile.dtype:
                torch.mm(dtile, weight, out=self.hidden[rows])
            else:
                self.hidden[rows] = torch.mm(dtile, weight).to(self.hidden.dtype)
            return
        dx = dtile.new_zeros(dtile.shape[0], weight.shape[1])
        for start in range(0, weight.shape[0], self.plan.weight_block):
            block = slice(start, start + self.plan.weight_block)
            dx.addmm_(dtile[:, block], weight[block].to(dtile.dtype))
        self.hidden[rows] = dx.to(self.hidden.dtype)

    def _add_weight(self, dtile: Tensor, x: Tensor) -> None:
        dtype = self.head.dtype
        if dtile.dtype != dtype and dtile.device.type == "cuda":
            if self.weight is None:
                self.weight = dtile.new_zeros(self.head.weight.shape, dtype=dtype)
            torch.addmm(self.weight, dtile.t(), x, out_dtype=dtype, out=self.weight)
            return
        dtile, x = dtile.to(dtype), x.to(dtype)
        if self.weight is None:
            self.weight = torch.mm(dtile.t(), x)
        else:
            self.weight.addmm_(dtile.t(), x)

    def finish(self, into: bool = False) -> Gradients:
        """The sums; `into`: dW is in the caller's buffer, and not among them."""
        head = self.head
        weight = head.hidden.new_empty(0, dtype=head.weight.dtype)
        if self.needs.weight and not into:
            weight = torch.zeros_like(head.weight) if self.weight is None else self.weight.to(head.weight.dtype)
        if head.group is not None and self.needs.hidden:
            dist.all_reduce(self.hidden, group=head.group)  # each rank holds its shard's share of dX
        bias = self.bias if head.bias is None or not self.needs.bias else self.bias.to(head.bias.dtype)
        return Gradients(self.hidden, weight, bias)


class _RowPasses:
    """Where row passes run: in line, or with two lanes on a stream of their own, beside the GEMMs of other chunks."""

    def __init__(self, device: torch.device, lanes: int):
        self.side = _side_stream(device) if lanes > 1 and device.type == "cuda" else None

    def after_gemm(self) -> AbstractContextManager[object]:
        """A context whose kernels wait for the GEMMs queued so far and for nothing later."""
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        return torch.cuda.stream(self.side)

    def record(self) -> torch.cuda.Event | None:
        """A mark behind the row passes queued so far."""
        return None if self.side is None else self.side.record_event()

    def wait_for(self, mark: torch.cuda.Event | None) -> None:
        """Later GEMMs wait for the row passes before the mark."""
        if self.side is not None and mark is not None:
            torch.cuda.current_stream(self.side.device).wait_event(mark)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _narrowed(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The tile in a dtype of half the size, in its own memory: row i lies in the first half of the old row i."""
    narrow = tile.view(dtype)[:, : tile.shape[1]]
    for start in range(0, tile.shape[0], 16):
        part = slice(start, start + 16)
        narrow[part] = tile[part].to(dtype)
    return narrow


def _take(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _write(out: RowStats, rows: Rows, stats: RowStats) -> None:
    for whole, part in zip(out, stats, strict=True):
        if whole is not None and part is not None:
            whole[rows] = part


def empty_stats(head: Head, entropy: bool) -> RowStats:
    """Statistics of all rows, 0 so far."""

    def zeros() -> Tensor:
        return head.hidden.new_zeros(head.ids.shape[0], dtype=head.dtype)

    return RowStats(zeros(), zeros(), zeros(), zeros() if entropy else None)


def score(
    head: Head,
    rows: Tensor | None,
    entropy: bool,
    plan: Plan,
    out: RowStats | None = None,
    logits: Tensor | None = None,
) -> RowStats:
    """Statistics of the given rows (None: all), 0 elsewhere. 2NDV FLOPs and one tile of memory.

    logits: (at least the number of rows, V) receives their raw products, in the order of rows.
    """
    out = empty_stats(head, entropy) if out is None else out
    tiles = [] if logits is not None or plan.schedule == "fused forward" else _tiles(head, plan, plan.tile_dtype)
    for number, part in _chunks(head, rows, plan):
        x, ids = head.rows(part), head.local_ids(part)
        if logits is not None:
            tile = logits[number * plan.chunk_rows :][: x.shape[0]]
            head.project(x, tile, plan.weight_block)
            stats = head.reduce(tile, ids, entropy)
        elif plan.schedule == "fused forward":
            stats = head.fused_stats(x, ids, entropy)
        elif plan.columns < head.weight.shape[0]:
            stats = head.streamed_stats(x, ids, tiles[0][: x.shape[0]], entropy, plan.weight_block)
        else:
            tile = tiles[0][: x.shape[0]]
            head.project(x, tile, plan.weight_block)
            stats = head.reduce(tile, ids, entropy)
        _write(out, part, stats)
    return out


def backward(
    head: Head,
    stats: RowStats,  # of all N rows, as score returned them
    rows: Tensor | None,  # the rows that carry a gradient (None: all)
    grad_logps: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    grad_lse: Tensor | None,  # (N,)
    needs: Needs,
    plan: Plan,
    logits: Tensor | None = None,  # raw products of all rows of the forward, if they were kept
    places: Tensor | None = None,  # (N,) row of `logits` that belongs to each row; None: its own
) -> Gradients:
    """Gradients of the inputs from those of the statistics: 6NDV FLOPs over the given rows, 4NDV with kept logits."""
    total = _Accumulator(head, needs, plan)
    mean = stats.mean if grad_entropy is not None else None
    vectors = (stats.row_max, stats.log_sum, mean, grad_logps, grad_entropy, grad_lse)
    tile = _tiles(head, plan, plan.tile_dtype)[0]
    for _, part in _chunks(head, rows, plan):
        x, ids = head.rows(part), head.local_ids(part)
        chunk = [None if v is None else _take(v, part) for v in vectors]
        products = tile[: x.shape[0]]
        out = total.gradient_tile(products, 0)
        if logits is None:
            head.project(x, products, plan.weight_block)
        elif places is None and isinstance(part, slice):
            products = logits[part]
        else:
            where = part if places is None else _take(places, part)
            torch.index_select(logits, 0, where, out=products)  # type: ignore[arg-type]
        head.backend.row_grad(products, out, ids, head.transform, head.bias, *chunk, None, None)  # type: ignore
        total.add(out, x, part)
    return total.finish()


def pack(alive: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Moves (source, target), each (k,), that bring the k alive rows to the front.

    Alive rows behind the first k go into the dead slots before it; so no row is written that another move reads.
    """
    target = torch.arange(k, device=alive.device)
    source = target.clone()
    source[~alive[:k]] = alive[k:].nonzero().squeeze(-1) + k
    return source, target


def gradient_norms(grad_logps: Tensor | None, grad_entropy: Tensor | None, stats: RowStats) -> Tensor:
    """L1 norm (n,) of each row's dlogits at temperature 1, known before they are made.

    Exact for the log-probability, `2 |c| (1 - p)`; the entropy's part, `|c_H| E|log p + H|`, is bounded by `2 |c_H| H`.
    """
    norms = torch.zeros_like(stats.logps)
    if grad_logps is not None:
        norms += 2 * grad_logps.abs() * -torch.expm1(stats.logps)
    if grad_entropy is not None and stats.entropy is not None:
        norms += 2 * grad_entropy.abs() * stats.entropy
    return norms


def negligible(norms: Tensor, tolerance: float) -> Tensor:
    """The rows, bool (n,), of smallest norm whose norms together are at most `tolerance` of the sum of all."""
    order = norms.double().sort(stable=True)
    within = order.values.cumsum(0) <= tolerance * order.values.sum()
    return torch.zeros_like(within).scatter(0, order.indices, within)


class Skipped(NamedTuple):
    """What bounded-error skipping left out: rows, the sum of their gradients' norms, and that of all rows."""

    rows: Tensor
    norm: Tensor
    total: Tensor


# (rows, logps, entropy) of a chunk -> per-token loss, d loss / d logps, d loss / d entropy
Coefficients = Callable[[Rows, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


def single_pass(
    head: Head,
    live: Tensor | None,  # rows that may carry a gradient (None: all)
    coefficients: Coefficients,
    entropy: bool,
    needs: Needs,
    plan: Plan,
    *,
    tolerance: float = 0.0,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, RowStats, Gradients, Skipped]:
    """Loss terms (N,), statistics and gradients of a token-local objective: each chunk is finished before the next.

    A live row whose coefficients come out exactly 0 (clipped, say) costs its logits and nothing more on the CPU: row
    pass 2 packs the other rows to the front of the tile while it writes their gradient, so the GEMMs see only those.
    With a tolerance, on any device, so do the rows of a chunk whose gradients' norms together are within that share of
    the chunk's sum. weight_grad: a buffer that dW is added to.
    """
    stats = empty_stats(head, entropy)
    terms = torch.zeros_like(stats.logps)
    total = _Accumulator(head, needs, plan, weight_grad)
    skipped = Skipped(*(terms.new_zeros((), dtype=torch.float64) for _ in Skipped._fields))
    tiles, passes = _tiles(head, plan, plan.tile_dtype), _RowPasses(head.hidden.device, plan.lanes)
    # On a GPU the count of rows left stalls the queue at every chunk, so rows are packed there only if asked for.
    packs = head.inside is None and (head.hidden.device.type == "cpu" or tolerance > 0)
    # Chunks before their last two GEMMs. ids are kept with them: the side stream may still be reading.
    waiting: list[tuple[torch.cuda.Event | None, Tensor, Tensor, Rows, Tensor]] = []

    def finish_until(left: int) -> None:
        while len(waiting) > left:
            mark, dtile, x, part, _ = waiting.pop(0)
            passes.wait_for(mark)
            total.add(dtile, x, part)

    for number, part in _chunks(head, live, plan):
        x, ids = head.rows(part), head.local_ids(part)
        tile = tiles[number % plan.lanes][: x.shape[0]]
        head.project(x, tile, plan.weight_block)
        with passes.after_gemm():
            chunk = head.reduce(tile, ids, entropy)
            _write(stats, part, chunk)
            terms[part], grad_logps, grad_entropy = coefficients(part, chunk.logps, chunk.entropy)
            if not any(needs):
                continue
            source = target = None
            if packs:
                alive = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
                if tolerance > 0:
                    norms = gradient_norms(grad_logps, grad_entropy, chunk)
                    drop = negligible(norms, tolerance) & alive
                    alive &= ~drop
                    found = (drop.sum(), norms[drop].sum(dtype=torch.float64), norms.sum(dtype=torch.float64))
                    skipped = Skipped(*(a + b for a, b in zip(skipped, found, strict=True)))
                k = int(alive.sum())
                if k == 0:
                    continue
                if k < x.shape[0]:
                    source, target = pack(alive, k)
                    x = x.index_select(0, source)
                    part = part.start + source if isinstance(part, slice) else part.index_select(0, source)
            out = total.gradient_tile(tile[: x.shape[0]], number % plan.lanes)
            head.backend.row_grad(
                tile, out, ids, head.transform, head.bias, chunk.row_max, chunk.log_sum,
                chunk.mean if grad_entropy is not None else None, grad_logps, grad_entropy, None, source, target,
            )  # fmt: skip
            waiting.append((passes.record(), out, x, part, ids))
        finish_until(plan.lanes - 1)
    finish_until(0)
    passes.wait_for(passes.record())
    return terms, stats, total.finish(into=weight_grad is not None), skipped


def compare(
    student: Head,
    teacher: Head,  # of the same rows and the same vocabulary
    rows: Tensor | None,  # the rows to compare (None: all)
    kind: str,
    beta: float,
    token_weight: Tensor | None,  # (N,); None: no gradient is wanted
    needs: Needs,
    plan: Plan,
) -> tuple[Tensor, Gradients]:
    """Divergence (N,) of the student's rows from the teacher's, 0 in others, and the gradients of its weighted sum.

    Two GEMMs and one row pass per chunk, and two GEMMs for the student's gradients: 8NDV for heads of one size.
    """
    divergence = student.hidden.new_zeros(student.hidden.shape[0], dtype=student.dtype)
    total = _Accumulator(student, needs, plan)
    tile, ref_tile = (_tiles(head, plan, plan.tile_dtype)[0] for head in (student, teacher))
    for _, part in _chunks(student, rows, plan):
        x = student.rows(part)
        products, ref_products = tile[: x.shape[0]], ref_tile[: x.shape[0]]
        student.project(x, products, plan.weight_block)
        teacher.project(teacher.rows(part), ref_products, plan.weight_block)
        out = total.gradient_tile(products, 0) if any(needs) else None
        divergence[part] = student.backend.divergence_rows(
            products, ref_products, kind, beta, student.transform, teacher.transform, student.bias, teacher.bias,
            None if out is None or token_weight is None else _take(token_weight, part), out,
        )  # fmt: skip
        if out is not None:
            total.add(out, x, part)
    return divergence, total.finish()
