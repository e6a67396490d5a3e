"""linear_logprobs and logprobs_from_logits against fp64: values, gradients, masks, odd inputs, errors, operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tolerance import assert_as_accurate
from torch import Tensor

import fastrl
from fastrl_kernels import ops, planner

CPU_BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Chunks of a few rows and columns, so that small inputs cross every border."""
    with planner.forced(tile_bytes=1, min_rows=3, weight_block=100, score_rows=4):
        yield


def inputs(
    n: int, d: int, v: int, dtype: torch.dtype, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) / d**0.5).to(dtype)
    return hidden, weight, torch.randint(v, (n,)), torch.randn(v).to(dtype) if bias else None


def run(
    call: Callable[..., fastrl.TokenStats],
    tensors: list[Tensor | None],
    upstream: list[Tensor],
    at: torch.dtype | None = None,
) -> list[Tensor]:
    """logps, entropy, lse and the gradients of the given tensors, with a random upstream gradient per token."""
    leaves = [None if x is None else x.detach().to(at or x.dtype).requires_grad_() for x in tensors]
    stats = call(*leaves)
    total = sum((o * g.to(o.dtype)).sum() for o, g in zip(stats, upstream, strict=True) if o is not None)
    grads = torch.autograd.grad(total, [x for x in leaves if x is not None])  # type: ignore[arg-type]
    return [o.detach() for o in stats if o is not None] + list(grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, d, v",
    [(1, 1, 1), (2, 3, 2), (7, 8, 127), (7, 8, 128), (7, 8, 129), (13, 16, 507)],
    ids=["all ones", "two columns", "below a vector", "a vector", "above it", "odd"],
)
def test_matches_fp64(n: int, d: int, v: int, dtype: torch.dtype, small_tiles: None) -> None:
    check_against_fp64(n, d, v, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_at_a_realistic_vocabulary(dtype: torch.dtype) -> None:
    check_against_fp64(300, 32, 12992, dtype)


def check_against_fp64(n: int, d: int, v: int, dtype: torch.dtype) -> None:
    for options in ({}, {"temperature": 0.5}, {"temperature": 1.5, "logit_scale": 0.3, "softcap": 5.0}):
        for with_bias in (False, True):
            hidden, weight, ids, bias = inputs(n, d, v, dtype, with_bias)
            mask = torch.rand(n) > 0.3
            upstream = [torch.randn(n) for _ in range(3)]

            def call(backend: str) -> Callable[..., fastrl.TokenStats]:
                return lambda h, w, b: fastrl.linear_logprobs(
                    h,
                    w,
                    ids,
                    bias=b,
                    mask=mask,
                    entropy=True,
                    backend=backend,
                    **options,
                )

            tensors = [hidden, weight, bias]
            truth = run(call("reference"), tensors, upstream, torch.float64)
            plain, ours = run(call("reference"), tensors, upstream), run(call("cpu"), tensors, upstream)
            names = ("logps", "entropy", "lse", "dX", "dW", "db")
            for name, o, p, t in zip(names[: len(ours)], ours, plain, truth, strict=True):
                assert o.dtype == p.dtype
                assert_as_accurate(o, p, t, f"{name} {options} bias={with_bias}")
            assert (ours[0] <= 0).all() and all((x[~mask] == 0).all() for x in ours[:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_from_logits_matches_fp64(dtype: torch.dtype) -> None:
    for v in (1, 2, 129, 2049):
        logits, ids, mask = (torch.randn(9, v) * 5).to(dtype), torch.randint(v, (9,)), torch.rand(9) > 0.3
        upstream = [torch.randn(9) for _ in range(3)]

        def call(backend: str) -> Callable[..., fastrl.TokenStats]:
            return lambda x: fastrl.logprobs_from_logits(
                x,
                ids,
                temperature=0.7,
                mask=mask,
                entropy=True,
                backend=backend,
            )

        truth = run(call("reference"), [logits], upstream, torch.float64)
        plain, ours = run(call("reference"), [logits], upstream), run(call("cpu"), [logits], upstream)
        for name, o, p, t in zip(("logps", "entropy", "lse", "dlogits"), ours, plain, truth, strict=True):
            assert o.dtype == p.dtype
            assert_as_accurate(o, p, t, f"{name} V={v}")


@pytest.mark.parametrize("temperature", (0.5, 1.0, 1.5))
def test_temperature_reaches_every_output(temperature: float) -> None:
    hidden, weight, ids, _ = inputs(6, 8, 50, torch.float64)
    z = (hidden @ weight.T / temperature).log_softmax(-1)
    stats = fastrl.linear_logprobs(hidden, weight, ids, temperature=temperature, entropy=True)
    torch.testing.assert_close(stats.logps, z.gather(-1, ids[:, None])[:, 0])
    torch.testing.assert_close(stats.entropy, -(z.exp() * z).sum(-1))
    torch.testing.assert_close(stats.lse, (hidden @ weight.T / temperature).logsumexp(-1))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(backend: str, small_tiles: None) -> None:
    hidden, weight, ids, bias = inputs(5, 4, 11, torch.float64, True)
    mask = torch.tensor([1, 0, 1, 1, 1])
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]

    def head(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        stats = fastrl.linear_logprobs(
            h, w, ids, bias=b, mask=mask, entropy=True, temperature=0.8, logit_scale=1.4, softcap=3.0, backend=backend
        )
        return tuple(x for x in stats if x is not None)

    assert torch.autograd.gradcheck(head, leaves)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: tuple(fastrl.logprobs_from_logits(x, ids, mask=mask, entropy=True, backend=backend)), (logits,)
    )


def test_chunks_change_rounding_only() -> None:
    hidden, weight, ids, bias = inputs(50, 16, 300, torch.float32, True)
    upstream = [torch.randn(50) for _ in range(3)]

    def call(*x: Tensor) -> fastrl.TokenStats:
        return fastrl.linear_logprobs(x[0], x[1], ids, bias=x[2], entropy=True)

    truth = run(call, [hidden, weight, bias], upstream, torch.float64)
    errors = []
    for rows, block in ((50, 1024), (7, 64), (1, 1)):
        with planner.forced(tile_bytes=1, min_rows=rows, weight_block=block, score_rows=rows):
            out = run(call, [hidden, weight, bias], upstream)
        errors.append(max(((o - t).abs().max() / t.abs().max()).item() for o, t in zip(out, truth, strict=True)))
    assert max(errors) < 2e-6, errors  # 50 chunks of one row are as good as one


def test_bf16_weight_gradient_does_not_decay_with_chunks() -> None:
    """dW is summed in fp32 and rounded once: its error is flat in the number of chunks."""
    hidden, weight, ids, _ = inputs(256, 8, 64, torch.bfloat16)
    upstream = [torch.rand(256), torch.zeros(256), torch.zeros(256)]

    def call(*x: Tensor) -> fastrl.TokenStats:
        return fastrl.linear_logprobs(x[0], x[1], ids, entropy=True)

    truth = run(call, [hidden, weight], upstream, torch.float64)[-1]
    errors = []
    for rows in (256, 16, 1):
        with planner.forced(tile_bytes=1, min_rows=rows):
            errors.append((run(call, [hidden, weight], upstream)[-1].double() - truth).abs().max().item())
    assert max(errors) <= 1.05 * errors[0] + 1e-9, errors


def test_twice_the_same_bits_and_inputs_untouched(small_tiles: None) -> None:
    hidden, weight, ids, bias = inputs(20, 8, 300, torch.float32, True)
    tensors = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    copies, versions = [x.detach().clone() for x in tensors], [x._version for x in tensors]
    upstream = [torch.randn(20) for _ in range(3)]
    stats = fastrl.linear_logprobs(hidden, weight, ids, bias=bias, entropy=True)
    total = sum((o * g).sum() for o, g in zip(stats, upstream, strict=True) if o is not None)
    first = torch.autograd.grad(total, tensors, retain_graph=True)  # type: ignore[arg-type]
    again = torch.autograd.grad(total, tensors, retain_graph=True)  # type: ignore[arg-type]
    fresh = run(lambda *x: fastrl.linear_logprobs(x[0], x[1], ids, bias=x[2], entropy=True), tensors, upstream)[-3:]  # type: ignore[arg-type]
    for a, b, c in zip(first, again, fresh, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert all(torch.equal(x, c) for x, c in zip(tensors, copies, strict=True))
    assert [x._version for x in tensors] == versions


def test_two_losses_on_one_hidden_state() -> None:
    hidden, weight, ids, _ = inputs(8, 4, 20, torch.float64)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    a = fastrl.linear_logprobs(hidden * 2, weight, ids).logps.sum()
    b = fastrl.linear_logprobs(hidden * 2, weight, ids.flip(0)).logps.square().sum()
    together = torch.autograd.grad(a + b, leaves, retain_graph=True)
    apart = [torch.autograd.grad(x, leaves) for x in (a, b)]
    for t, x, y in zip(together, *apart, strict=True):
        torch.testing.assert_close(t, x + y)


def test_strided_expanded_and_transposed_inputs() -> None:
    n, d, v = 6, 5, 30
    base = torch.randn(d, 2 * n, dtype=torch.float64)
    hidden = base.t()[::2]  # transposed and sliced
    weight = torch.randn(v, 2 * d, dtype=torch.float64)[:, ::2]
    bias = torch.randn(1, dtype=torch.float64).expand(v)
    ids = torch.randint(v, (2 * n,))[::2]
    expanded = torch.randn(1, d, dtype=torch.float64).expand(n, d)
    for h in (hidden, expanded, hidden.reshape(2, 3, d), hidden.reshape(3, 2, d).transpose(0, 1)):
        token_ids = ids.reshape(h.shape[:-1])
        for upstream in (
            torch.randn(1, dtype=torch.float64).expand(h.shape[:-1]),
            torch.randn(h.shape[:-1], dtype=torch.float64),
        ):
            results = []
            for backend in CPU_BACKENDS:
                x, w = h.detach().requires_grad_(), weight.detach().requires_grad_()
                logps = fastrl.linear_logprobs(x, w, token_ids, bias=bias, backend=backend).logps
                results.append([logps, *torch.autograd.grad(logps, [x, w], upstream)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)
    logits = torch.randn(v, n, dtype=torch.float64).t()
    got = fastrl.logprobs_from_logits(logits, ids).logps
    torch.testing.assert_close(got, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_masked_rows_are_never_read(backend: str) -> None:
    hidden, weight, ids, _ = inputs(6, 4, 20, torch.float32)
    mask = torch.tensor([1, 0, 1, 0, 1, 1])
    clean = hidden.clone()
    hidden[1], hidden[3] = torch.nan, torch.inf
    ids[1], ids[3] = -100, 10**9
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    stats = fastrl.linear_logprobs(x, w, ids, mask=mask, entropy=True, backend=backend)
    grads = torch.autograd.grad(sum(o.sum() for o in stats if o is not None), [x, w])  # type: ignore[arg-type]
    assert all((o[mask == 0] == 0).all() for o in (*stats, grads[0]) if o is not None)
    assert grads[1].isfinite().all()
    want = fastrl.linear_logprobs(clean[mask == 1], weight, ids[mask == 1], backend=backend).logps
    torch.testing.assert_close(stats.logps[mask == 1], want)


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 5), (2, 0), (2, 3, 4)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    hidden = torch.randn(*shape, 4, requires_grad=True)
    weight = torch.randn(10, 4, requires_grad=True)
    ids = torch.randint(10, shape)
    stats = fastrl.linear_logprobs(hidden, weight, ids, entropy=True)
    assert all(o.shape == shape for o in stats if o is not None)
    stats.logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and weight.grad.isfinite().all()
    logits = torch.randn(*shape, 10, requires_grad=True)
    fastrl.logprobs_from_logits(logits, ids).logps.sum().backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape


def test_65537_rows() -> None:
    """More rows than a grid's second axis holds."""
    n, v = 65537, 3
    hidden, weight, ids, _ = inputs(n, 2, v, torch.float32)
    logps = fastrl.linear_logprobs(hidden, weight, ids).logps
    torch.testing.assert_close(
        logps, (hidden @ weight.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )


def test_infinite_bias_in_whole_blocks(small_tiles: None) -> None:
    """A streamed block of columns whose logits are all -inf adds nothing."""
    hidden, weight, ids, bias = inputs(5, 4, 350, torch.float64, True)
    assert bias is not None
    bias[:200] = -torch.inf
    ids = ids % 100 + 220
    stats = fastrl.linear_logprobs(hidden, weight, ids, bias=bias, entropy=True)
    z = (hidden @ weight.T + bias)[:, 200:]
    torch.testing.assert_close(stats.logps, z.log_softmax(-1).gather(-1, ids[:, None] - 200)[:, 0])
    torch.testing.assert_close(stats.lse, z.logsumexp(-1))
    torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(logits=z).entropy())


def test_nan_stays_in_its_row(small_tiles: None) -> None:
    hidden, weight, ids, _ = inputs(9, 4, 350, torch.float32)
    good = fastrl.linear_logprobs(hidden, weight, ids, entropy=True)
    hidden[4, 1] = torch.nan
    bad = fastrl.linear_logprobs(hidden, weight, ids, entropy=True)
    rest = torch.arange(9) != 4
    for a, b in zip(good, bad, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a[rest], b[rest]) and b[4].isnan()


@pytest.mark.parametrize("offset", (1e2, 1e4, 1e6))
def test_large_common_offset(offset: float) -> None:
    """All logits shifted by a bias: the log-probabilities must not lose what the shift adds (pytorch #195829)."""
    hidden, ids = torch.randint(-8, 8, (5, 4)).float(), torch.randint(300, (5,))
    weight = torch.randint(-4, 4, (300, 4)).float() / 8
    plain = fastrl.linear_logprobs(hidden, weight, ids, entropy=True)
    shifted = fastrl.linear_logprobs(hidden, weight, ids, bias=torch.full((300,), offset), entropy=True)
    torch.testing.assert_close(shifted.logps, plain.logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shifted.entropy, plain.entropy, rtol=1e-6, atol=1e-6)


def test_frozen_weight_allocates_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    make_zeros, mm = torch.Tensor.new_zeros, torch.mm
    monkeypatch.setattr(
        torch.Tensor,
        "new_zeros",
        lambda self, *a, **k: shapes.append(tuple((x := make_zeros(self, *a, **k)).shape)) or x,
    )
    monkeypatch.setattr(torch, "mm", lambda *a, **k: shapes.append(tuple((x := mm(*a, **k)).shape)) or x)
    hidden, weight, ids, _ = inputs(6, 8, 600, torch.float32)
    for needed in (False, True):
        shapes.clear()
        fastrl.linear_logprobs(
            hidden.detach().requires_grad_(), weight.detach().requires_grad_(needed), ids
        ).logps.sum().backward()
        assert ((600, 8) in shapes) == needed


def test_autocast_and_mixed_dtypes() -> None:
    hidden, weight, ids, _ = inputs(6, 8, 40, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps = fastrl.linear_logprobs(hidden, weight, ids).logps
        want = fastrl.linear_logprobs(hidden.bfloat16(), weight.bfloat16(), ids).logps
    assert torch.equal(logps, want) and logps.dtype == torch.float32
    grads = torch.autograd.grad(logps.sum(), [hidden, weight])
    assert all(g.dtype == torch.float32 for g in grads)
    mixed = fastrl.linear_logprobs(hidden.bfloat16(), weight, ids).logps
    assert torch.equal(mixed, fastrl.linear_logprobs(hidden.bfloat16().float(), weight, ids).logps)


def test_compiles_as_one_graph() -> None:
    hidden, weight, ids, bias = inputs(6, 8, 40, torch.float32, True)
    tensors = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        stats = fastrl.linear_logprobs(h * 1.5, w, ids, bias=b, mask=mask, entropy=True, temperature=0.9)
        more = fastrl.logprobs_from_logits(h, ids % 8, mask=mask)
        return (stats.logps * stats.lse).sum() + stats.entropy.sum() + more.logps.sum()  # type: ignore[union-attr]

    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_operators_are_well_registered() -> None:
    hidden, weight, ids, bias = inputs(6, 4, 20, torch.float32, True)
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    end = ("cpu", "", None, False, False)
    for grad in (False, True):
        h, w, b = (x.detach().requires_grad_(grad) for x in (hidden, weight, bias) if x is not None)
        for keep in (False, True):
            torch.library.opcheck(ops.linear_logprobs, (h, w, b, ids, mask, True, keep, 0.0, 0.9, 1.0, 5.0, *end))
        torch.library.opcheck(ops.linear_logprobs, (h, w, None, ids, None, False, False, 0.1, 0.9, 1.0, None, *end))
        logits = torch.randn(6, 20).requires_grad_(grad)
        torch.library.opcheck(ops.logprobs_from_logits, (logits, ids, mask, True, 0.9, "cpu"))
    with torch.no_grad():
        logps, entropy, _, *kept = ops.linear_logprobs(
            hidden, weight, bias, ids, mask, True, True, 0.0, 1.0, 1.0, None, *end
        )
        g = [torch.randn(6) for _ in range(3)]
        saved = (hidden, weight, bias, ids, mask, logps, entropy, *kept)
        args = (*saved, *g, True, True, True, 0.0, 1.0, 1.0, None, *end)
        torch.library.opcheck(ops.linear_logprobs_backward, args)
        logits = torch.randn(6, 20)
        stats = ops.logprobs_from_logits(logits, ids, mask, True, 1.0, "cpu")
        torch.library.opcheck(ops.logprobs_from_logits_backward, (logits, ids, mask, *stats[3:], *g, 1.0, "cpu"))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bad_input_is_named(backend: str) -> None:
    hidden, weight, ids, _ = inputs(6, 4, 20, torch.float32)

    def call(h: Tensor = hidden, w: Tensor = weight, i: Tensor = ids, **options: object) -> None:
        fastrl.linear_logprobs(h, w, i, backend=backend, **options)  # type: ignore[arg-type]

    bad = ids.clone()
    bad[2] = 20
    with pytest.raises(ValueError, match=r"ids.*\[0, 20\).*20 at flat position 2"):
        call(i=bad)
    bad[2] = -1
    with pytest.raises(ValueError, match="ids: 1 of 6"):
        call(i=bad)
    with pytest.raises(ValueError, match=r"ids.*\(6,\).*\(5,\)"):
        call(i=ids[:5])
    with pytest.raises(TypeError, match="ids"):
        call(i=ids.float())
    with pytest.raises(ValueError, match=r"weight.*\(V, 4\).*\(20, 3\)"):
        call(w=weight[:, :3])
    with pytest.raises(ValueError, match=r"weight.*ZeRO-3"):
        call(w=torch.empty(0))
    with pytest.raises(TypeError, match="hidden"):
        call(h=hidden.int())
    with pytest.raises(ValueError, match=r"bias.*\(20,\)"):
        call(bias=torch.zeros(19))
    with pytest.raises(ValueError, match=r"mask.*\(6,\)"):
        call(mask=torch.ones(5))
    with pytest.raises(ValueError, match="temperature"):
        call(temperature=0.0)
    with pytest.raises(ValueError, match="softcap"):
        call(softcap=-1.0)
    with pytest.raises(ValueError, match="logit_scale"):
        call(logit_scale=float("nan"))
    with pytest.raises(ValueError, match="ids"):
        fastrl.logprobs_from_logits(torch.randn(3, 5), torch.tensor([0, 5, 1]), backend=backend)


def test_zero3_parameter_is_refused() -> None:
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 3  # type: ignore[attr-defined]  # what DeepSpeed leaves on a partitioned parameter
    with pytest.raises(ValueError, match=r"weight: a ZeRO-3 parameter is sharded.*patch_model"):
        fastrl.linear_logprobs(torch.randn(2, 4), weight, torch.zeros(2, dtype=torch.int64))


def test_unusable_backends_say_why() -> None:
    hidden, weight, ids, _ = inputs(2, 4, 20, torch.float32)
    with pytest.raises(ValueError, match=r"backend must be None or one of reference, cpu, triton, cuda, got 'numpy'"):
        fastrl.linear_logprobs(hidden, weight, ids, backend="numpy")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"'cuda' does not work here: .*(FASTRL_CUDA=on|no CUDA device)"):
            fastrl.linear_logprobs(hidden, weight, ids, backend="cuda")
        with pytest.raises((RuntimeError, ValueError), match=r"triton.*(CUDA|can't be imported)"):
            fastrl.linear_logprobs(hidden, weight, ids, backend="triton")
