"""Row statistics of `x @ weight.T` in one kernel: the logits never leave the chip, not even a tile of them.

A program owns a block of rows and a run of the vocabulary: GEMM tile after GEMM tile, each folded into four numbers per
row while it is still in registers. A second, small kernel merges the runs, in a fixed order. 2NDV FLOPs; what is
written is `16 * splits` bytes a row, where the logits would be 4V.
"""

# An annotation on a kernel argument would be its Triton type.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastrl_kernels import tuning
from fastrl_kernels.backends import triton_interpreted
from fastrl_kernels.head import LogitTransform, RowStats
from fastrl_kernels.triton.launch import (
    LINEAR_DTYPES,
    MAX_COLUMNS,
    MERGE_CONFIG,
    LinearConfig,
    chip,
    dtype_name,
    launch_device,
    linear_config,
    linear_schedule,
    rounded,
    seconds,
    vector,
)
from fastrl_kernels.triton.transform import logit_and_slope, transform_scales


@triton.jit
def program_place(row_blocks, splits, group_rows):
    """(row block, split) of this program.

    Programs that run at the same time form a square of the product: group_rows blocks of rows times all splits. So the
    rows stay in L2 while the weight streams through it once for each group.
    """
    program = tl.program_id(0)
    first = program // (group_rows * splits) * group_rows
    size = tl.minimum(row_blocks - first, group_rows)
    place = program % (group_rows * splits)
    return first + place % size, place // size


@triton.jit
def empty_stats(ROWS: tl.constexpr):
    """Statistics of no columns: max, sum of exp(z - max), sum of exp(z - max) * (z - max), logit of the row's token."""
    nothing = tl.full((ROWS,), float("-inf"), tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    return nothing, zero, zero, nothing


@triton.jit
def fold_columns(
    x,  # (ROWS, COLS) products
    first,  # vocabulary id of the first column
    ragged,  # whether a column may be past the end
    met,  # whether some row's token may be here
    stats,  # as empty_stats
    head,  # token, bias_ptr, V, gain_in, gain_out
    SOFTCAP: tl.constexpr,
    IDENTITY: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLS: tl.constexpr,
):
    row_max, row_sum, row_dot, token_logit = stats
    token, bias_ptr, V, gain_in, gain_out = head
    cols = first + tl.arange(0, COLS)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=cols < V, other=0.0)[None, :]
    if IDENTITY:
        z = x
    else:
        z, _ = logit_and_slope(x, gain_in, gain_out, SOFTCAP)
    if ragged:  # after the transform: the softcap of -inf is finite
        z = tl.where((cols < V)[None, :], z, float("-inf"))
    if met:
        taken = tl.where(cols[None, :] == token[:, None], z, float("-inf"))
        token_logit = tl.maximum(token_logit, tl.max(taken, 1))

    new_max = tl.maximum(row_max, tl.max(z, 1))
    # While everything seen is -inf the shift is 0, or -inf - -inf would poison the row.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    nothing_yet = row_max == float("-inf")
    alpha = tl.where(nothing_yet, 0.0, tl.exp(row_max - shift))
    d = z - shift[:, None]
    e = tl.exp(d)
    if ENTROPY:
        moved = tl.where(nothing_yet, 0.0, row_max - shift)
        # A logit of -inf adds 0, not 0 * -inf.
        row_dot = alpha * (row_dot + row_sum * moved) + tl.sum(e * tl.maximum(d, -1e30), 1)
    row_sum = alpha * row_sum + tl.sum(e, 1)
    return new_max, row_sum, row_dot, token_logit


@triton.jit
def halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of the columns; only the names of the registers change."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def fold_block(
    product,  # (ROWS, COLS)
    first,  # vocabulary id of the first column
    stats,
    head,
    SOFTCAP: tl.constexpr,
    IDENTITY: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The statistics with one more tile of products in them.

    In pieces, so that the exponentials of one are gone before those of the next are made: the tile alone takes half of
    the registers (on Blackwell a piece is also what is read from tensor memory at a time).
    """
    token, _, V, _, _ = head
    ragged = first + COLS > V
    # Few tiles hold the token of any of their rows; the others need not compare every column with it.
    met = tl.max(((token >= first) & (token < first + COLS)).to(tl.int32), 0) > 0
    WIDTH: tl.constexpr = COLS // PIECES
    if PIECES == 1:
        stats = fold_columns(product, first, ragged, met, stats, head, SOFTCAP, IDENTITY, ENTROPY, WIDTH)
    else:
        left, right = halves(product, ROWS, COLS)
        if PIECES == 2:
            pieces = (left, right)
        else:
            a, b = halves(left, ROWS, COLS // 2)
            c, d = halves(right, ROWS, COLS // 2)
            if PIECES == 4:
                pieces = (a, b, c, d)  # type: ignore[assignment]
            else:
                tl.static_assert(PIECES == 8)
                QUARTER: tl.constexpr = COLS // 4
                pieces = (
                    halves(a, ROWS, QUARTER) + halves(b, ROWS, QUARTER)
                    + halves(c, ROWS, QUARTER) + halves(d, ROWS, QUARTER)
                )  # fmt: skip
        for i in tl.static_range(PIECES):
            stats = fold_columns(
                pieces[i], first + i * WIDTH, ragged, met, stats, head, SOFTCAP, IDENTITY, ENTROPY, WIDTH
            )
    return stats


@triton.jit
def load_token(ids_ptr, rows, n, V):
    """The rows' ids as int32; -1, which matches no column, past the last row and outside the vocabulary."""
    token = tl.load(ids_ptr + rows, mask=rows < n, other=-1)
    return tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)


@triton.jit
def store_partial(stats, partial_ptr, rows, split, n, splits, ENTROPY: tl.constexpr):
    row_max, row_sum, row_dot, token_logit = stats
    plane = splits.to(tl.int64) * n
    out = partial_ptr + split.to(tl.int64) * n + rows
    inside = rows < n
    tl.store(out, row_max, mask=inside)
    tl.store(out + plane, row_sum, mask=inside)
    tl.store(out + 2 * plane, token_logit, mask=inside)
    if ENTROPY:
        tl.store(out + 3 * plane, row_dot, mask=inside)


@triton.jit(do_not_specialize=["n", "V", "splits", "span", "group_rows"])
def linear_stats_fwd_kernel(
    x_ptr,  # (n, D)
    weight_ptr,  # (V, D)
    ids_ptr,  # (n,) int64
    bias_ptr,  # (V,) fp32 or None
    partial_ptr,  # (3 or 4, splits, n) fp32
    n,
    V,
    D,
    x_stride,
    x_step,  # stride of the last dimension, as weight_step: 1, or the loads are narrow
    weight_stride,
    weight_step,
    splits,
    span,  # vocabulary blocks in a split
    group_rows,
    scale_in: tl.float64,
    scale_out: tl.float64,
    SOFTCAP: tl.constexpr,
    IDENTITY: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Any GPU and any D: loads through pointers."""
    row_block, split = program_place(tl.cdiv(n, BLOCK_ROWS), splits, group_rows)
    first_row = row_block * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    head = (
        load_token(ids_ptr, rows, n, V), bias_ptr, V,
        tl.full((), scale_in, tl.float32), tl.full((), scale_out, tl.float32),
    )  # fmt: skip
    stats = empty_stats(BLOCK_ROWS)

    depth = tl.arange(0, BLOCK_DEPTH)
    # A tile's own offsets are int32, its base is int64. Rows past the end read the last row again: the loads need no
    # mask for them, and nothing of them is stored.
    near = tl.minimum(tl.arange(0, BLOCK_ROWS), n - 1 - first_row)
    x_tile = x_ptr + first_row.to(tl.int64) * x_stride + (near[:, None] * x_stride + depth[None, :] * x_step)
    first = split * span * BLOCK_COLS
    last = tl.minimum(first + span * BLOCK_COLS, V)
    weight_base = weight_ptr + first.to(tl.int64) * weight_stride
    for start in range(first, last, BLOCK_COLS):
        cols = tl.minimum(tl.arange(0, BLOCK_COLS), V - 1 - start)
        a_ptrs, b_ptrs = x_tile, weight_base + (cols[None, :] * weight_stride + depth[:, None] * weight_step)
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for k in range(0, D, BLOCK_DEPTH):
            inside = depth < D - k
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
            product = tl.dot(a, b, product, input_precision=PRECISION)
            a_ptrs += BLOCK_DEPTH * x_step
            b_ptrs += BLOCK_DEPTH * weight_step
        weight_base += BLOCK_COLS * weight_stride
        stats = fold_block(product, start, stats, head, SOFTCAP, IDENTITY, ENTROPY, BLOCK_ROWS, BLOCK_COLS, PIECES)
    store_partial(stats, partial_ptr, rows, split, n, splits, ENTROPY)


@triton.jit(do_not_specialize=["n", "V", "splits", "span", "group_rows"])
def linear_stats_tma_fwd_kernel(
    x_desc,  # (n, D)
    weight_desc,  # (V, D)
    ids_ptr,  # (n,) int64
    bias_ptr,  # (V,) fp32 or None
    partial_ptr,  # (3 or 4, splits, n) fp32
    n,
    V,
    D,
    splits,
    span,  # vocabulary blocks in a split
    group_rows,
    scale_in: tl.float64,
    scale_out: tl.float64,
    SOFTCAP: tl.constexpr,
    IDENTITY: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Hopper and later: tiles come by TMA, and one loop runs over all (vocabulary block, depth) of the program.

    So the copies for the next block are under way, and the tensor cores are not drained, until a block's statistics are
    taken; as two loops every block would start with an empty pipeline. TMA reads zeros past the ends of n, V and D.
    """
    row_block, split = program_place(tl.cdiv(n, BLOCK_ROWS), splits, group_rows)
    first_row = row_block * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    head = (
        load_token(ids_ptr, rows, n, V), bias_ptr, V,
        tl.full((), scale_in, tl.float32), tl.full((), scale_out, tl.float32),
    )  # fmt: skip
    stats = empty_stats(BLOCK_ROWS)

    first = split * span * BLOCK_COLS
    last = tl.minimum(first + span * BLOCK_COLS, V)
    steps = tl.cdiv(D, BLOCK_DEPTH)
    step = -1
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for _ in range(0, tl.cdiv(last - first, BLOCK_COLS) * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        a = x_desc.load([first_row, step * BLOCK_DEPTH])
        b = weight_desc.load([first, step * BLOCK_DEPTH])
        product = tl.dot(a, b.T, product, input_precision=PRECISION)
        if step == steps - 1:
            stats = fold_block(product, first, stats, head, SOFTCAP, IDENTITY, ENTROPY, BLOCK_ROWS, BLOCK_COLS, PIECES)
            first += BLOCK_COLS
            product = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    store_partial(stats, partial_ptr, rows, split, n, splits, ENTROPY)


@triton.jit(do_not_specialize=["n", "V", "splits"])
def linear_stats_merge_kernel(
    partial_ptr,  # (3 or 4, splits, n) fp32
    ids_ptr,  # (n,) int64
    row_max_ptr,  # (n,) fp32, as are the three below
    log_sum_ptr,  # (n,)
    logps_ptr,  # (n,)
    mean_ptr,  # (n,) or None
    n,
    V,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < n
    plane = splits.to(tl.int64) * n
    row_max, row_sum, row_dot, token_logit = empty_stats(BLOCK_ROWS)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        mask = (split < splits)[:, None] & inside[None, :]
        piece = partial_ptr + split.to(tl.int64)[:, None] * n + rows[None, :]
        piece_max = tl.load(piece, mask=mask, other=float("-inf"))
        piece_sum = tl.load(piece + plane, mask=mask, other=0.0)
        piece_token = tl.load(piece + 2 * plane, mask=mask, other=float("-inf"))

        new_max = tl.maximum(row_max, tl.max(piece_max, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        moved = tl.where(row_max == float("-inf"), 0.0, row_max - shift)
        piece_moved = tl.where(piece_max == float("-inf"), 0.0, piece_max - shift[None, :])
        # A piece of -inf only has sum 0; if it is NaN, the row is.
        alpha, piece_alpha = tl.exp(moved), tl.exp(piece_moved)
        if mean_ptr is not None:
            piece_dot = tl.load(piece + 3 * plane, mask=mask, other=0.0)
            row_dot = alpha * (row_dot + row_sum * moved)
            row_dot += tl.sum(piece_alpha * (piece_dot + piece_sum * piece_moved), 0)
        row_sum = alpha * row_sum + tl.sum(piece_alpha * piece_sum, 0)
        token_logit = tl.maximum(token_logit, tl.max(piece_token, 0))
        row_max = new_max

    # A NaN or +inf logit has made the sum NaN. All -inf: the sum is 0, its log -inf.
    log_sum = tl.log(row_sum)
    tl.store(row_max_ptr + rows, row_max, mask=inside)
    tl.store(log_sum_ptr + rows, log_sum, mask=inside)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, row_dot / row_sum, mask=inside)
    token = tl.load(ids_ptr + rows, mask=inside, other=-1)
    # -1: another vocabulary shard owns this token. Any other id outside [0, V) is loud.
    token_logit = tl.where((token < -1) | (token >= V), float("nan"), token_logit)
    tl.store(logps_ptr + rows, (token_logit - row_max) - log_sum, mask=inside)


def allows_tf32() -> bool:
    """Whether torch lets a product of fp32 operands use tf32, by any of its switches."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def check_operands(x: Tensor, weight: Tensor) -> None:
    """Raises TypeError or ValueError unless x is (n, D) and weight is (V, D), of one dtype and on one device."""
    if x.dtype not in LINEAR_DTYPES or weight.dtype != x.dtype:
        names = ", ".join(map(str, LINEAR_DTYPES))
        raise TypeError(f"x and weight must have one dtype of {names}, got {x.dtype} and {weight.dtype}")
    if x.dim() != 2 or not 1 <= x.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"x must have shape (n, D) with D >= 1, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or not 1 <= weight.shape[0] <= MAX_COLUMNS:
        raise ValueError(f"weight must have shape (V, {x.shape[1]}) with V >= 1, got {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device}, where x is, got {weight.device}")


def takes_descriptors(x: Tensor) -> bool:
    """Whether TMA can read the rows of a tensor: last dimension contiguous, rows at multiples of 16 bytes."""
    row_bytes = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and 0 < row_bytes < 2**40 and row_bytes % 16 == 0 and x.data_ptr() % 16 == 0


def candidates(x: Tensor, weight: Tensor) -> tuple[LinearConfig, tuple[LinearConfig, ...]]:
    """The table's configuration for these operands, and all that a measurement may choose from."""
    device = chip(x.device)
    descriptors = takes_descriptors(x) and takes_descriptors(weight)
    # Triton reads vectors where it knows sizes and strides to be multiples of 16.
    vectors = descriptors and x.stride(0) % 16 == weight.stride(0) % 16 == x.shape[1] % 16 == 0
    return linear_config(x.shape[0], x.shape[1], x.dtype, allows_tf32(), descriptors, vectors, device)


def choose_config(
    x: Tensor, weight: Tensor, ids: Tensor, transform: LogitTransform, bias: Tensor | None, entropy: bool
) -> LinearConfig:
    """The configuration measured to be the fastest for such a call, or the table's."""
    default, possible = candidates(x, weight)
    n, vocabulary = x.shape[0], weight.shape[0]
    key = (
        f"{dtype_name(x.dtype)} n{rounded(n)} D{x.shape[1]} V{rounded(vocabulary)} tma={default.descriptors} "
        f"tf32={allows_tf32()} softcap={transform.softcap is not None} entropy={entropy}"
    )
    return tuning.tuned(
        "linear_row_stats",
        key,
        possible,
        lambda config: seconds(lambda: linear_row_stats(x, weight, ids, transform, bias, entropy, config), x.device),
        default,
    )


def linear_row_stats(
    x: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (n,)
    transform: LogitTransform,
    bias: Tensor | None,  # (V,)
    entropy: bool,
    config: LinearConfig | None = None,
) -> RowStats:
    """Max, log-sum, log-probability of `ids` and entropy of each row of logits, without the logits.

    Eager equivalent: `row_stats(x.float() @ weight.float().T, ids, transform, bias, entropy)`.

    Args:
        x: (n, D) in bf16, fp16 or fp32, of any strides. Products of fp32 operands are exact
            (input precision "ieee") unless torch.backends.cuda.matmul.fp32_precision is "tf32".
        weight: (V, D) in the dtype of x, of any strides (TMA wants the last dimension contiguous and rows at multiples
            of 16 bytes).
        ids: (n,) int64; -1 marks a token of another vocabulary shard, whose logp is -inf.
        transform: how a raw product becomes a logit.
        bias: (V,) in a floating dtype, or None; added before the transform.
        entropy: whether to compute the mean logit, and so the entropy, too.
        config: a launch configuration; None takes the tuned one, or the table's.

    Returns:
        RowStats of (n,) fp32 tensors. A row that holds NaN, +inf, or only -inf has a NaN logp and mean; no other row is
        touched by it. The same call gives the same bits.

    Raises:
        TypeError, ValueError: a dtype, shape, device or layout other than the above.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    check_operands(x, weight)
    (n, depth), vocabulary = x.shape, weight.shape[0]
    device = x.device
    ids_ = vector("ids", ids, n, device, torch.int64)
    bias_ = vector("bias", bias, vocabulary, device, torch.float32)
    row_max, log_sum, logps = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(3))
    mean = torch.empty(n, dtype=torch.float32, device=device) if entropy else None
    stats = RowStats(row_max, log_sum, logps, mean)
    if n == 0:
        return stats
    if triton_interpreted():  # its dot of bf16 is garbage
        x, weight = x.float(), weight.float()
    with launch_device(linear_stats_fwd_kernel, x, "x"):
        if config is None:
            config = choose_config(x, weight, ids, transform, bias, entropy)
        schedule = linear_schedule(n, vocabulary, config, chip(device).processors)
        partial = torch.empty((4 if entropy else 3, schedule.splits, n), dtype=torch.float32, device=device)
        scale_in, scale_out = transform_scales(transform)
        strides: tuple[int, ...] = ()
        if config.descriptors:
            block = [config.block_rows, config.block_depth], [config.block_cols, config.block_depth]
            operands = TensorDescriptor.from_tensor(x, block[0]), TensorDescriptor.from_tensor(weight, block[1])
            kernel = linear_stats_tma_fwd_kernel
        else:
            operands, strides = (x, weight), (*x.stride(), *weight.stride())
            kernel = linear_stats_fwd_kernel
        kernel[(schedule.row_blocks * schedule.splits,)](
            *operands,
            ids_,
            bias_,
            partial,
            n,
            vocabulary,
            depth,
            *strides,
            schedule.splits,
            schedule.span,
            schedule.group_rows,
            scale_in,
            scale_out,
            SOFTCAP=transform.softcap is not None,
            IDENTITY=transform.softcap is None and scale_in == 1.0,
            ENTROPY=entropy,
            PRECISION="tf32" if x.dtype == torch.float32 and allows_tf32() else "ieee",
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLS=config.block_cols,
            BLOCK_DEPTH=config.block_depth,
            PIECES=config.pieces,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # Small tiles: more programs on a multiprocessor are worth a spill to the assembler, unless it is told the
            # limit. TMA's large tiles have no such choice, and tensor memory is better left to the assembler.
            maxnreg=None if config.descriptors or chip(device).capability >= 10 else 255,
            # As in row_stats: a logit must be rounded once, before the maximum is taken and subtracted.
            enable_fp_fusion=False,
        )
        linear_stats_merge_kernel[(triton.cdiv(n, MERGE_CONFIG.block_rows),)](
            partial,
            ids_,
            *stats,
            n,
            vocabulary,
            schedule.splits,
            BLOCK_ROWS=MERGE_CONFIG.block_rows,
            BLOCK_SPLITS=MERGE_CONFIG.block_splits,
            num_warps=MERGE_CONFIG.num_warps,
            enable_fp_fusion=False,
        )
    return stats
