"""LayerNorm and RMSNorm kernels in the interpreter, judged against float64."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import traffic
from harness import LAYOUTS, assert_unwritten, compare, guard, huge_stride_rows, max_error

from fastgpt_kernels import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    normalization,
    reference,
    rms_norm,
)
from fastgpt_kernels.normalization import norm_fwd

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# rows, columns, dtype, layout of x, grad_output
PAIRS = [
    (1, 1, torch.float32, "contiguous", "random"),
    (7, 7, torch.bfloat16, "padded", "expanded"),
    (64, 64, torch.float16, "transposed", "random"),
    (7, 41, torch.bfloat16, "offset", "random"),
    (64, 768, torch.bfloat16, "contiguous", "random"),
    (5, 1023, torch.float32, "transposed", "expanded"),
    (3, 4096, torch.float16, "padded", "random"),
    (20, 9000, torch.bfloat16, "contiguous", "expanded"),
    (2, 17001, torch.float32, "offset", "random"),
]
SIZES = itertools.product((1, 7, 64), (1, 7, 64, 768, 1023, 1500, 4096, 16384, 65536), DTYPES)
# The layout changes with every case, so that each size and dtype meets several.
FULL = [
    (min(rows, 10) if columns > 8192 else rows, columns, dtype, LAYOUTS[index % 4], "random")
    for index, (rows, columns, dtype) in enumerate(SIZES)
]


def _inputs(rows, columns, dtype):
    x = torch.randn(rows, columns) * 2 + 3
    return [t.to(dtype) for t in (x, torch.randn(columns), torch.randn(columns))]


def _gradient_floor(columns):
    """In one column terms of size 1 cancel to ``eps / x^2``: their last bit is what may remain."""
    return 2.0**-23 if columns == 1 else 1e-30


def _check_layer_norm(rows, columns, dtype, layout, grad):
    shape = (columns,)
    compare(
        lambda x, w, b: layer_norm(x, shape, w, b),
        lambda x, w, b: F.layer_norm(x, shape, w, b),
        lambda x, w, b: reference.layer_norm(x, shape, w, b),
        _inputs(rows, columns, dtype),
        layouts=[layout, "contiguous", "padded"],
        grad_output=grad,
        gradient_floor=_gradient_floor(columns),
    )


def _check_rms_norm(rows, columns, dtype, layout, grad):
    shape = (columns,)
    compare(
        lambda x, w: rms_norm(x, shape, w),
        lambda x, w: F.rms_norm(x, shape, w),
        lambda x, w: reference.rms_norm(x, shape, w),
        _inputs(rows, columns, dtype)[:2],
        layouts=[layout, "padded"],
        grad_output=grad,
        gradient_floor=_gradient_floor(columns),
    )


@pytest.mark.parametrize(("rows", "columns", "dtype", "layout", "grad"), PAIRS)
def test_layer_norm(rows, columns, dtype, layout, grad):
    _check_layer_norm(rows, columns, dtype, layout, grad)


@pytest.mark.parametrize(("rows", "columns", "dtype", "layout", "grad"), PAIRS)
def test_rms_norm(rows, columns, dtype, layout, grad):
    _check_rms_norm(rows, columns, dtype, layout, grad)


def _check_add_norms(rows, columns, dtype, layout, grad):
    """Normalised sum and sum side by side, with a gradient of their own each."""
    shape, (x, w, b) = (columns,), _inputs(rows, columns, dtype)
    residual = torch.randn(rows, columns).to(dtype)
    layouts = [layout, "padded", "contiguous", "contiguous"]

    def plain(norm):
        def run(x, residual, *parameters):
            total = x + residual
            return torch.stack((norm(total, shape, *parameters), total))

        return run

    compare(
        lambda x, r, *parameters: torch.stack(add_layer_norm(x, r, shape, *parameters)),
        plain(F.layer_norm),
        plain(reference.layer_norm),
        [x, residual, w, b],
        layouts=layouts,
        grad_output=grad,
        gradient_floor=_gradient_floor(columns),
    )
    compare(
        lambda x, r, *parameters: torch.stack(add_rms_norm(x, r, shape, *parameters)),
        plain(F.rms_norm),
        plain(reference.rms_norm),
        [x, residual, w],
        layouts=layouts[:3],
        grad_output=grad,
        gradient_floor=_gradient_floor(columns),
    )


@pytest.mark.parametrize(("rows", "columns", "dtype", "layout", "grad"), PAIRS)
def test_add_norms(rows, columns, dtype, layout, grad):
    _check_add_norms(rows, columns, dtype, layout, grad)


@pytest.mark.full
@pytest.mark.parametrize(("rows", "columns", "dtype", "layout", "grad"), FULL)
def test_full_matrix(rows, columns, dtype, layout, grad):
    _check_layer_norm(rows, columns, dtype, layout, grad)
    _check_rms_norm(rows, columns, dtype, layout, grad)
    _check_add_norms(rows, columns, dtype, layout, grad)


@pytest.mark.parametrize("columns", [24, 9000])
def test_the_residual_may_be_wider(columns):
    """A float32 stream beside bfloat16 blocks: the sum is not rounded to bfloat16."""
    x, r = torch.randn(3, columns).bfloat16(), torch.randn(3, columns)
    leaves = [x.requires_grad_(), r.requires_grad_()]
    y, total = add_rms_norm(*leaves, columns)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, x.float() + r)
    grads = torch.randn(3, columns).bfloat16(), torch.randn(3, columns)
    ours = torch.autograd.grad((y, total), leaves, grads)
    exact = total.detach().double().requires_grad_()
    out = reference.rms_norm(exact, (columns,))
    (expected,) = torch.autograd.grad((out, exact), exact, [g.double() for g in grads])
    assert [g.dtype for g in ours] == [torch.bfloat16, torch.float32]
    assert max_error(ours[1], expected) < 1e-5
    assert max_error(ours[0], expected) < 2**-7 * expected.abs().max()


def test_only_one_of_the_two_outputs_used():
    x = torch.randn(3, 24, requires_grad=True)
    for index in (0, 1):
        add_layer_norm(x, x, 24)[index].square().sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.full
@pytest.mark.parametrize("rows", [1023, 4096])
def test_many_rows(rows):
    _check_layer_norm(rows, 64, torch.bfloat16, "contiguous", "random")
    _check_rms_norm(rows, 64, torch.float32, "contiguous", "random")


@pytest.mark.parametrize("columns", [40, 8200])
@pytest.mark.parametrize(
    ("with_weight", "with_bias"), [(False, False), (True, False), (False, True)]
)
def test_optional_parameters(columns, with_weight, with_bias):
    x, w, b = _inputs(4, columns, torch.float32)
    tensors = [x, *[w] * with_weight, *[b] * with_bias]

    def call(norm):
        def run(x, *rest):
            rest = list(rest)
            weight = rest.pop(0) if with_weight else None
            return norm(x, (columns,), weight, rest[0] if with_bias else None)

        return run

    compare(call(layer_norm), call(F.layer_norm), call(reference.layer_norm), tensors)


@pytest.mark.parametrize("dims", [(0, 1, 2), (1, 0, 2)])
def test_three_dimensional_rows_are_taken_as_they_lie(dims):
    """(B, T, D) seen transposed and sliced needs two row strides; nothing is copied."""
    base = guard(torch.randn(3, 10, 24))
    x = base[:, ::2].permute(dims)
    y = layer_norm(x, (24,))
    assert max_error(y, reference.layer_norm(x.double(), (24,))) < 1e-5
    grad = torch.randn(3, 10, 24)[:, ::2].permute(dims)
    leaf = x.detach().requires_grad_()
    layer_norm(leaf, 24).backward(grad)
    exact = x.double().requires_grad_()
    reference.layer_norm(exact, (24,)).backward(grad.double())
    assert max_error(leaf.grad, exact.grad) < 1e-5
    assert_unwritten(base)


def test_several_normalized_dims():
    compare(
        lambda x, w: layer_norm(x, (3, 7), w),
        lambda x, w: F.layer_norm(x, (3, 7), w),
        lambda x, w: reference.layer_norm(x, (3, 7), w),
        [torch.randn(5, 3, 7), torch.randn(3, 7)],
    )


@pytest.mark.parametrize("columns", [768, 17000])
def test_mean_far_above_the_spread(columns):
    """In bfloat16 at mean 100, spread 0.5, dw stays within 0.2 %: statistics are float32."""
    rows = 16 if columns < 1000 else 4
    x = (torch.randn(rows, columns) * 0.5 + 100).bfloat16()
    w, grad = torch.randn(columns).bfloat16(), torch.randn(rows, columns).bfloat16()
    y, mean, rstd = norm_fwd(x, w, None, 1, 1e-5, False)
    assert mean.dtype == rstd.dtype == torch.float32
    dw = torch.ops.fastgpt_kernels.norm_bwd(grad, x, mean, rstd, w, True, False, 1, False)[1]
    exact = w.double().requires_grad_()
    reference.layer_norm(x.double(), (columns,), exact).backward(grad.double())
    assert max_error(dw, exact.grad) <= 2e-3 * exact.grad.abs().max()
    exact_y = reference.layer_norm(x.double(), (columns,), w.double())
    assert max_error(y, exact_y) <= 2**-8 * exact_y.abs().max()


@pytest.mark.parametrize("columns", [96, 9000])
def test_repeats_bit_for_bit(columns):
    inputs = _inputs(6, columns, torch.bfloat16)

    def gradients():
        leaves = [x.clone().requires_grad_() for x in inputs]
        layer_norm(leaves[0], (columns,), *leaves[1:]).square().sum().backward()
        return [x.grad for x in leaves]

    assert all(map(torch.equal, gradients(), gradients()))


@pytest.mark.parametrize("columns", [64, 9000])
def test_rows_beyond_31_bits(columns):
    x = huge_stride_rows(torch.randn(3, columns).bfloat16())
    y, mean, rstd = norm_fwd(x, None, None, 1, 1e-5, False)
    torch.testing.assert_close(y, F.layer_norm(x.float(), (columns,)).bfloat16())
    dx = torch.ops.fastgpt_kernels.norm_bwd(x, x, mean, rstd, None, False, False, 1, False)[0]
    leaf = x.float().requires_grad_()
    F.layer_norm(leaf, (columns,)).backward(x.float())
    torch.testing.assert_close(dx.float(), leaf.grad, atol=2e-2, rtol=2e-2)


def test_no_rows():
    leaf = torch.empty(0, 8).requires_grad_()
    w = torch.ones(8, requires_grad=True)
    layer_norm(leaf, 8, w).sum().backward()
    assert leaf.grad.shape == (0, 8)
    assert torch.equal(w.grad, torch.zeros(8))


@pytest.mark.parametrize("columns", [64, 9000])
def test_columns_beyond_31_bits(columns):
    """A transposed input reaches as far along its columns as along its rows."""
    x = huge_stride_rows(torch.randn(columns, 3).bfloat16()).t()
    y, mean, rstd = norm_fwd(x, None, None, 1, 1e-5, False)
    near = x.contiguous()
    assert torch.equal(y, norm_fwd(near, None, None, 1, 1e-5, False)[0])
    far_grad, near_grad = (
        torch.ops.fastgpt_kernels.norm_bwd(g, g, mean, rstd, None, False, False, 1, False)[0]
        for g in (x, near)
    )
    assert torch.equal(far_grad, near_grad)


def _counted_backward(rows, columns, dtype, rms):
    x, w, _ = _inputs(rows, columns, dtype)
    grad = torch.randn(rows, columns).to(dtype)
    _, mean, rstd = norm_fwd(x, w, None, 1, 1e-5, rms)
    with traffic.count() as moved:
        dx, *_ = torch.ops.fastgpt_kernels.norm_bwd(grad, x, mean, rstd, w, True, not rms, 1, rms)
    return moved, x, grad, dx


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "rms"),
    [(1024, 64, torch.bfloat16, False), (48, 8192, torch.float32, True)],
)
def test_backward_moves_what_it_must(rows, columns, dtype, rms):
    """x and dy are read once, dx is written once; all the rest is within 5 % of them."""
    moved, x, grad, dx = _counted_backward(rows, columns, dtype, rms)
    assert moved.loads(x) == moved.loads(grad) == traffic.once(x)
    assert moved.stores(dx) == traffic.once(dx)
    compulsory = traffic.nbytes(x, grad, dx)
    assert moved.loads().total + moved.stores().total <= 1.05 * compulsory


class Cache:
    """Least recently used lines of 128 bytes."""

    def __init__(self, size):
        self.lines, self.capacity, self.missed = collections.OrderedDict(), size // 128, 0

    def touch(self, addresses):
        for line in np.unique(addresses // 128).tolist():
            self.missed += 128 * (line not in self.lines)
            self.lines[line] = True
            self.lines.move_to_end(line)
            if len(self.lines) > self.capacity:
                self.lines.popitem(last=False)


def _missed(moved, size):
    cache = Cache(size)
    for access in sorted([*moved._loads, *moved._stores], key=lambda a: a.program):
        cache.touch(access.addresses)
    return cache.missed


def test_wide_backward_reads_again_from_the_cache(monkeypatch):
    """Two readings of x and dy, the second answered by an L2 cache that holds half of them."""
    rows, columns, size = 144, 1024, 480 << 10
    monkeypatch.setattr(normalization, "FUSED_BACKWARD_MAX", columns - 1)
    monkeypatch.setattr(normalization, "INTERPRETED_L2", size)
    moved, x, grad, dx = _counted_backward(rows, columns, torch.bfloat16, True)
    for tensor in (x, grad):
        assert moved.loads(tensor).total == 2 * traffic.nbytes(tensor)
    assert moved.stores(dx) == traffic.once(dx)
    compulsory = traffic.nbytes(x, grad, dx)
    assert compulsory > 1.5 * size
    assert _missed(moved, size) <= 1.05 * compulsory
    # One chunk of all rows does not fit, and that shows.
    monkeypatch.setattr(normalization, "INTERPRETED_L2", 1 << 30)
    moved, *_ = _counted_backward(rows, columns, torch.bfloat16, True)
    assert _missed(moved, size) > 1.3 * compulsory


def test_gradients_of_no_rows_are_as_described():
    """torch.compile trusts the description of an operator: sums in float32."""
    x, w, statistics = torch.randn(0, 8).bfloat16(), torch.randn(8).bfloat16(), torch.empty(0)
    arguments = x, x, statistics, statistics, w, True, True, 1, False
    dx, dw, db = torch.ops.fastgpt_kernels.norm_bwd(*arguments)
    assert torch.equal(dw, torch.zeros(8))
    assert torch.equal(db, torch.zeros(8))
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    torch.library.opcheck(torch.ops.fastgpt_kernels.norm_bwd.default, arguments)


@pytest.mark.parametrize("columns", [24, 9000])
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_cost_no_sums(frozen, columns, monkeypatch):
    """As of a norm in a model whose adapters alone are trained."""
    launch, made = normalization._launch_bwd, []
    monkeypatch.setattr(
        normalization, "_launch_bwd", lambda *a: made.append(launch(*a)) or made[-1]
    )
    given = {"x": torch.randn(5, columns), "weight": torch.randn(columns)}
    given["bias"] = torch.ones(columns)
    grad, results = torch.randn(5, columns), []
    for names in ((), frozen):
        leaves = {name: x.clone().requires_grad_(name not in names) for name, x in given.items()}
        layer_norm(leaves["x"], columns, leaves["weight"], leaves["bias"]).backward(grad)
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    trained, found = results
    for name, value in found.items():
        assert (value is None) == (name in frozen)
        assert value is None or torch.equal(value, trained[name])
    sizes = [columns * (name not in frozen) for name in ("weight", "bias")]
    assert [sums.numel() for sums in made[1][1:]] == sizes
