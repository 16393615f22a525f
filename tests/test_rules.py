"""Each rule against its formula, written out slowly in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from replica import epsilon_rule, gamma_rule
from torch import Tensor, nn
from transformers.activations import ACT2FN, NewGELUActivation

from relp import ATTN_LRP, CP_LRP, DEEPLIFT, GIM, GRADIENT, RELP, Rules, propagate

SEEDS = (0, 1, 2)
RATIOS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    # y / x in closed form, the limit at 0 included
    "gelu": (F.gelu, lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "silu": (F.silu, lambda x: 0.5 * (1 + math.tanh(x / 2))),
    "relu": (F.relu, lambda x: float(x > 0)),
    "relu6": (F.relu6, lambda x: min(x, 6) / x if x > 0 else 0.0),
    "leaky_relu": (F.leaky_relu, lambda x: 1.0 if x > 0 else 0.01),
    "elu": (F.elu, lambda x: 1.0 if x >= 0 else math.expm1(x) / x),
    "hardtanh": (F.hardtanh, lambda x: min(1.0, 1 / abs(x)) if x else 1.0),
    "hardswish": (F.hardswish, lambda x: min(max((x + 3) / 6, 0), 1)),
    "softsign": (F.softsign, lambda x: 1 / (1 + abs(x))),
    "mish": (F.mish, lambda x: math.tanh(max(x, 0) + math.log1p(math.exp(-abs(x))))),
    "tanh": (torch.tanh, lambda x: math.tanh(x) / x if x else 1.0),
    "erf": (torch.erf, lambda x: math.erf(x) / x if x else 2 / math.sqrt(math.pi)),
    # sigmoid(0) = 1/2 is a bias: what is left is tanh(x / 2) / 2
    "sigmoid": (torch.sigmoid, lambda x: math.tanh(x / 2) / 2 / x if x else 0.25),
    "new_gelu": (
        NewGELUActivation(),
        lambda x: 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "quick_gelu": (ACT2FN["quick_gelu"], lambda x: 0.5 * (1 + math.tanh(1.702 * x / 2))),
}


def coefficient(
    function: Callable[..., Tensor], x: Tensor, rules: Rules, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Value and summed coefficient of one function under some rules."""
    x = x.clone().requires_grad_()
    with propagate(rules) as report:
        y = function(x)
    if other is not None:
        with report.reference():
            function(other)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_is_the_ratio_also_at_zero(name: str, dtype: torch.dtype) -> None:
    function, ratio = RATIOS[name]
    small = [1e-3, 1e-8, 1e-12, 1e-30, 1e-37]
    sizes = torch.tensor([0.0, *small, 2e-4, 0.7, 1.3, 5.0, 6.0, 1e4, 1e30], dtype=dtype)
    x = torch.cat([sizes, -sizes])
    y, c = coefficient(function, x, RELP)
    assert torch.equal(y, function(x))
    expected = torch.tensor([ratio(v) for v in x.tolist()], dtype=torch.float64)
    # sigmoid(x) - 1/2 loses digits near 0: rounding of the value itself
    close = 2e-4 if name == "sigmoid" and dtype == torch.float32 else 1e-6
    torch.testing.assert_close(c.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("name", RATIOS)
def test_identity_is_the_slope_at_zero_for_denormal_inputs(name: str) -> None:
    """Their quotient has lost its digits; what they carry is below 1e-38 anyway."""
    function, ratio = RATIOS[name]
    _, c = coefficient(function, torch.tensor([1e-42, -1e-42, 1e-45]), RELP)
    torch.testing.assert_close(c, torch.full((3,), ratio(0.0)))


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("seed", SEEDS)
def test_rescale_explains_the_difference_exactly(name: str, seed: int) -> None:
    function, _ = RATIOS[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, generator=generator, dtype=torch.float64)
    other = torch.randn(50, generator=generator, dtype=torch.float64)
    other[:10] = x[:10] + 1e-9 * other[:10]
    other[10:15] = x[10:15]
    _, c = coefficient(function, x, DEEPLIFT, other)
    step = other - x
    far = step.abs() > 1e-6
    expected = (function(other) - function(x)) / step
    torch.testing.assert_close(c[far], expected[far], rtol=1e-6, atol=1e-9)
    with_grad = x.clone().requires_grad_()
    slope = torch.autograd.grad(function(with_grad).sum(), with_grad)[0]
    torch.testing.assert_close(c[~far], slope[~far], rtol=1e-6, atol=1e-7)


def test_rescale_is_right_at_a_kink_and_accurate_for_small_steps() -> None:
    x = torch.tensor([-4e-4, -1e-3], dtype=torch.float32)
    other = torch.tensor([6e-4, 1e-4], dtype=torch.float32)
    _, c = coefficient(F.relu, x, DEEPLIFT, other)
    torch.testing.assert_close(c, torch.tensor([0.6, 1 / 11]), rtol=1e-3, atol=1e-6)
    # in float32 the plain quotient would be off by percents here
    x = torch.linspace(-3, 3, 200)
    other = x + 3e-5
    _, c = coefficient(F.gelu, x, DEEPLIFT, other)
    wide, step = x.double(), other.double() - x.double()
    expected = (F.gelu(other.double()) - F.gelu(wide)) / step
    torch.testing.assert_close(c.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RATIOS)
def test_rescale_is_accurate_at_every_distance(name: str) -> None:
    """In float32, against the quotient in float64; at no distance, the derivative."""
    function, _ = RATIOS[name]
    steps = torch.tensor([s * 10.0**k for k in range(-7, 4) for s in (1, -1)])
    x = torch.tensor([-30.0, -2.7, -1.1, -0.3, 0.2, 0.9, 2.5, 30.0])[:, None].expand(-1, len(steps))
    other = x + steps
    _, c = coefficient(function, x, DEEPLIFT, other)
    wide, wide_ = x.double(), other.double()
    expected = (function(wide_) - function(wide)) / torch.where(wide_ == wide, 1, wide_ - wide)
    leaf = wide.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
    expected = torch.where(wide_ == wide, slope, expected)
    torch.testing.assert_close(c.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_layer_norm_and_its_python_form_agree(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    other = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, generator=generator, dtype=torch.float64)
    mix = torch.randn(8, generator=generator, dtype=torch.float64)

    def fused(t: Tensor) -> Tensor:
        return F.layer_norm(t, (8,), weight, None, 1e-5) * mix

    def written(t: Tensor) -> Tensor:
        t = t - t.mean(-1, keepdim=True)
        return t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight * mix

    def fused_rms(t: Tensor) -> Tensor:
        return F.rms_norm(t, (8,), weight, 1e-6) * mix

    def written_rms(t: Tensor) -> Tensor:
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * weight * mix

    for one, two in ((fused, written), (fused_rms, written_rms)):
        for rules in (GRADIENT, RELP, DEEPLIFT):
            reference = other if rules.needs_reference else None
            _, c = coefficient(one, x, rules, reference)
            _, d = coefficient(two, x, rules, reference)
            torch.testing.assert_close(c, d, rtol=1e-9, atol=1e-11)


def test_the_ln_rule_by_hand() -> None:
    # x = (1, 3): centred (-1, 1), sigma = 1 for eps = 0; centring takes the mean of g away
    x = torch.tensor([[1.0, 3.0]], requires_grad=True)
    with propagate(RELP):
        y = F.layer_norm(x, (2,), None, None, 0.0)
    g = torch.tensor([[5.0, 1.0]])
    assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.tensor([[2.0, -2.0]]))
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    with propagate(RELP):
        y = F.rms_norm(x, (2,), torch.tensor([2.0, 1.0]), 0.0)
    root = math.sqrt(12.5)
    expected = torch.tensor([[10 / root, 1 / root]])
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_products(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, b, a_, b_, g = draw(2, 3), draw(3), draw(2, 3), draw(3), draw(2, 3)
    a[0, 0], b[1], a_[1, 2], g[1, 0] = 0, 1e-30, 1e4, 0
    for rules, at_a, at_b in (
        (GRADIENT, g * b, (g * a).sum(0)),
        (RELP, g * b / 2, (g * a).sum(0) / 2),
        (DEEPLIFT, g * (b + b_) / 2, (g * (a + a_) / 2).sum(0)),
    ):
        one, two = a.clone().requires_grad_(), b.clone().requires_grad_()
        with propagate(rules) as report:
            y = one * two
        if rules.needs_reference:
            with report.reference():
                a_ * b_
        grads = torch.autograd.grad(y, (one, two), g)
        torch.testing.assert_close(grads[0], at_a)
        torch.testing.assert_close(grads[1], at_b)


@pytest.mark.parametrize("spelling", ["matmul", "einsum", "bmm"])
def test_matrix_products(spelling: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def multiply(x: Tensor, y: Tensor) -> Tensor:
        if spelling == "einsum":
            return torch.einsum("bij,bjk->bik", x, y)
        return torch.bmm(x, y) if spelling == "bmm" else x @ y

    a, b, a_, b_, g = draw(2, 3, 4), draw(2, 4, 5), draw(2, 3, 4), draw(2, 4, 5), draw(2, 3, 5)
    for rules, at_a, at_b in (
        (RELP, g @ b.mT, a.mT @ g),
        (ATTN_LRP, g @ b.mT / 2, a.mT @ g / 2),
        (DEEPLIFT, g @ (b + b_).mT / 2, (a + a_).mT @ g / 2),
    ):
        one, two = a.clone().requires_grad_(), b.clone().requires_grad_()
        with propagate(rules) as report:
            y = multiply(one, two)
        if rules.needs_reference:
            with report.reference():
                multiply(a_, b_)
        grads = torch.autograd.grad(y, (one, two), g)
        torch.testing.assert_close(grads[0], at_a)
        torch.testing.assert_close(grads[1], at_b)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("spread", [1e-6, 0.3, 5.0])
def test_softmax_secant_step_by_step(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    other = x + spread * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    x[:, 4:], other[:, 4:] = -math.inf, -math.inf
    g = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    with propagate(DEEPLIFT) as report:
        y = leaf.softmax(-1)
    with report.reference():
        after = other.softmax(-1)
    c = torch.autograd.grad(y, leaf, g)[0]
    assert torch.equal(c[:, 4:], torch.zeros(4, 2, dtype=torch.float64))

    # the docstring's formula, one row and one entry at a time
    def mean(a: float, b: float) -> float:
        return a if abs(a - b) < 1e-15 * a else (a - b) / math.log(a / b)

    for row in range(4):
        e = [math.exp(v) for v in x[row].tolist()[:4]]
        e_ = [math.exp(v) for v in other[row].tolist()[:4]]
        total, total_ = sum(e), sum(e_)
        inner = [mean(a / total, b / total_) for a, b in zip(e, e_, strict=True)]
        share = [mean(a, b) / mean(total, total_) for a, b in zip(e, e_, strict=True)]
        assert sum(share) <= 1 + 1e-9
        for i in range(4):
            arrived = g[row, i] * inner[i]
            pull = share[i] * sum(float(g[row, k]) * inner[k] for k in range(4))
            torch.testing.assert_close(c[row, i], arrived - pull, rtol=1e-4, atol=1e-7)
    explained = ((other - x)[:, :4] * c[:, :4]).sum()
    torch.testing.assert_close(explained, (g * (after - y.detach())).sum(), rtol=1e-8, atol=1e-12)


def test_softmax_secant_survives_scores_that_differ_widely() -> None:
    x = torch.tensor([[0.0, 1.0, -2.0], [60.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    other = torch.tensor([[80.0, 3.0, 0.0], [-60.0, 2.0, 0.0], [-90.0, -90.0, -90.0]])
    g = torch.tensor([[1.0, -2.0, 0.5]] * 3)
    leaf = x.clone().requires_grad_()
    with propagate(DEEPLIFT) as report:
        y = leaf.softmax(-1)
    with report.reference():
        after = other.softmax(-1)
    c = torch.autograd.grad(y, leaf, g)[0]
    explained = ((other - x) * c).sum(-1)
    torch.testing.assert_close(explained, (g * (after - y.detach())).sum(-1), rtol=1e-5, atol=1e-5)
    assert float(c.abs().max()) <= 2.0 * float(g.abs().max())


SCORES = torch.tensor(
    # masked, one alone, as sure as can be, undecided, close
    [
        [1.0, -2.0, 4.0, -math.inf],
        [0.5, -math.inf, -math.inf, -math.inf],
        [1e4, -1e4, 0.0, 9.9e3],
        [7.0, 7.0, 7.0, 7.0],
        [1e4, 1e4 - 0.5, 1e4 + 1, 0.0],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("rules", [GRADIENT, ATTN_LRP, GIM], ids=lambda r: r.name)
def test_softmax_of_one_run_entry_by_entry(rules: Rules) -> None:
    """Σ_j g_j p_j (δ_ij - p_i) with p at temperature 1, in GIM at temperature 2.

    GIM (arXiv:2505.17630) leaves out the factor 1/2 that the derivative of softmax(x / 2) has.
    """
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(SCORES.shape, generator=generator, dtype=torch.float64)
    leaf = SCORES.clone().requires_grad_()
    with propagate(rules):
        y = leaf.softmax(-1)
    assert torch.equal(y, SCORES.softmax(-1))
    (found,) = torch.autograd.grad(y, leaf, g)
    temperature = 2 if rules is GIM else 1
    for row in range(len(SCORES)):
        x = [v / temperature for v in SCORES[row].tolist()]
        e = [math.exp(v - max(x)) for v in x]
        p = [v / sum(e) for v in e]
        for i in range(4):
            expected = sum(float(g[row, j]) * p[j] * ((i == j) - p[i]) for j in range(4))
            assert float(found[row, i]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def logarithmic_mean(log_a: float, log_b: float) -> float:
    """(a - b) / (log a - log b) from the logs, its limit a where they meet."""
    if abs(log_a - log_b) < 1e-9:
        return math.exp((log_a + log_b) / 2)
    return (math.exp(log_a) - math.exp(log_b)) / (log_a - log_b)


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", ["same", "close", "far", "swapped"])
def test_softmax_secants_on_masked_and_extreme_scores(
    function: str, dtype: torch.dtype, change: str
) -> None:
    """The docstrings' formulas from logs, where no exponential is too large or too small."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(SCORES.shape, generator=generator, dtype=torch.float64)
    x = SCORES.to(dtype)
    if change == "swapped":  # what was likely becomes unlikely; the mask stays
        other = torch.where(x.isneginf(), x, -x)
    else:
        other = x + ({"same": 0, "close": 1e-3, "far": 300}[change] * noise).to(dtype)
    g = noise.flip(0).to(dtype)
    leaf = x.clone().requires_grad_()
    with propagate(DEEPLIFT) as report:
        y = getattr(leaf, function)(-1)
    with report.reference():
        getattr(other, function)(-1)
    (found,) = torch.autograd.grad(y, leaf, torch.where(y.isinf(), 0, g))

    def lse(row: list[float]) -> float:
        return max(row) + math.log(sum(math.exp(v - max(row)) for v in row))

    digits = 1e-8 if dtype == torch.float64 else 3e-3  # scores of 1e4 have three digits after 0
    for row in range(len(x)):
        a, b = x[row].tolist(), other[row].tolist()
        s, s_ = lse(a), lse(b)
        seen = [i for i in range(4) if a[i] > -math.inf]
        top = max(s, s_)
        mean_of_sums = logarithmic_mean(s - top, s_ - top)
        share = {i: logarithmic_mean(a[i] - top, b[i] - top) / mean_of_sums for i in seen}
        inner = {i: logarithmic_mean(a[i] - s, b[i] - s_) for i in seen}
        for i in seen:
            arrived = {
                j: float(g[row, j]) * (inner[j] if function == "softmax" else 1) for j in seen
            }
            expected = arrived[i] - share[i] * sum(arrived.values())
            assert float(found[row, i]) == pytest.approx(expected, rel=digits, abs=digits), (row, i)
        assert all(float(found[row, i]) == 0 for i in range(4) if i not in seen)


def test_log_softmax_secant_explains_the_difference() -> None:
    x = torch.tensor([[0.0, 1.0, -2.0], [60.0, 0.0, 1.0]])
    other = torch.tensor([[3.0, 1.5, 0.0], [-60.0, 2.0, 0.0]])
    g = torch.tensor([[1.0, -2.0, 0.5]] * 2)
    leaf = x.clone().requires_grad_()
    with propagate(DEEPLIFT) as report:
        y = leaf.log_softmax(-1)
    with report.reference():
        after = other.log_softmax(-1)
    c = torch.autograd.grad(y, leaf, g)[0]
    explained = ((other - x) * c).sum(-1)
    torch.testing.assert_close(explained, (g * (after - y.detach())).sum(-1), rtol=1e-5, atol=1e-4)


def test_log_softmax_under_the_rules_for_softmax() -> None:
    """x - lse(x), of which a constant softmax leaves x, and GIM all."""
    g, x = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.0, 1.0, -2.0]])
    derivative = g - x.softmax(-1) * g.sum()
    for rules, expected in ((CP_LRP, g), (GIM, derivative), (RELP, derivative)):
        leaf = x.clone().requires_grad_()
        with propagate(rules):
            y = leaf.log_softmax(-1)
        torch.testing.assert_close(torch.autograd.grad(y, leaf, g)[0], expected)


HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu module": NewGELUActivation(),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "square": lambda x: x * x,
}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rules", [RELP, DEEPLIFT], ids=lambda r: r.name)
def test_half_precision_rounds_the_coefficient_only(
    name: str, dtype: torch.dtype, rules: Rules
) -> None:
    """Against double precision at the same inputs, which differ by a digit or two of theirs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=generator).to(dtype)
    other = (x.float() * (1 + torch.finfo(dtype).eps)).to(dtype)
    g = torch.randn(4, 8, generator=generator).to(dtype)

    def run(dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        with propagate(rules) as report:
            y = HALVES[name](leaf)
        if rules.needs_reference:
            with report.reference():
                HALVES[name](other.to(dtype))
        (c,) = torch.autograd.grad(y, leaf, g.to(dtype))
        assert c.dtype == dtype
        return c.double()

    found, expected = run(dtype), run(torch.float64)
    assert (found - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()


def test_constant_softmax_lets_nothing_through() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with propagate(CP_LRP):
        y = x.softmax(-1) @ torch.eye(4)
    assert not y.requires_grad


def test_division_and_square_root_explain_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = torch.rand(2, 20, generator=generator, dtype=torch.float64) + 0.5

    def function(t: Tensor) -> Tensor:
        return t / (1 + t * t).sqrt() + 2 / (t + 1) + t.square().mean().rsqrt() + t.exp()

    y, c = coefficient(function, x, DEEPLIFT, other)
    torch.testing.assert_close(((other - x) * c).sum(), (function(other) - y).sum())


SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float, float], float]]] = {
    # (f(b) - f(a)) / (b - a) for b != a without a difference that could cancel, f'(a) for b = a
    "sqrt": (torch.sqrt, lambda a, b: 1 / (math.sqrt(a) + math.sqrt(b))),
    "rsqrt": (torch.rsqrt, lambda a, b: -1 / (math.sqrt(a * b) * (math.sqrt(a) + math.sqrt(b)))),
    "reciprocal": (torch.reciprocal, lambda a, b: -1 / (a * b)),
    "power": (lambda t: t**-0.5, lambda a, b: -1 / (math.sqrt(a * b) * (a**0.5 + b**0.5))),
    "exp": (torch.exp, lambda a, b: math.exp(a) * (math.expm1(b - a) / (b - a) if b != a else 1)),
    "division": (lambda t: 3 / t, lambda a, b: -3 / (a * b)),
    "both": (lambda t: t / (t + 1), lambda a, b: 1 / ((a + 1) * (b + 1))),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_of_statistics_and_exponentials(name: str) -> None:
    """Also where the two runs agree or nearly do, and for tiny and large statistics."""
    function, slope = SLOPES[name]
    sizes = [1e-12, 1e-3, 0.7, 1.0, 1 + 1e-12, 2.0, 30.0]
    pairs = [(a, b) for a in sizes for b in sizes]
    x = torch.tensor([a for a, _ in pairs], dtype=torch.float64)
    other = torch.tensor([b for _, b in pairs], dtype=torch.float64)
    _, c = coefficient(function, x, DEEPLIFT, other)
    expected = torch.tensor([slope(a, b) for a, b in pairs], dtype=torch.float64)
    torch.testing.assert_close(c, expected, rtol=1e-7, atol=0)


def test_complex_numbers_have_no_rule() -> None:
    x = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError) as error, propagate(RELP):
        x.tanh()
    assert str(error.value) == (
        "a rule is for real numbers; an operation got complex ones that carry relevance; write it "
        "with their real and imaginary parts"
    )


def test_constant_exponents_let_nothing_through() -> None:
    x = torch.randn(3, requires_grad=True)
    for function in (torch.exp, torch.exp2, torch.expm1, F.softplus, nn.Softplus()):
        with propagate(RELP):
            assert not function(x).requires_grad


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1.0, 1e6])
@pytest.mark.parametrize("change", ["same", "close", "far"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_entry_by_entry(kind: str, change: str, size: float) -> None:
    """The LN-rule, and the secant as c̄ Δr + r̄ Δc with r = 1 / σ written as a quotient.

    Over two axes, at inputs of zero, smaller and larger than eps.
    """
    generator = torch.Generator().manual_seed(2)

    def draw() -> Tensor:
        return torch.randn(2, 3, generator=generator, dtype=torch.float64)

    x, g, weight, eps = size * draw(), draw(), draw(), 1e-5
    other = x + {"same": 0.0, "close": 1e-7 * size, "far": 2.0}[change] * draw()
    leaf = x.clone().requires_grad_()

    def norm(t: Tensor) -> Tensor:
        if kind == "layer":
            return F.layer_norm(t, (2, 3), weight, None, eps)
        return F.rms_norm(t, (2, 3), weight, eps)

    def parts(t: Tensor) -> tuple[list[float], float]:
        flat = t.flatten().tolist()
        mean = sum(flat) / 6 if kind == "layer" else 0.0
        centred = [v - mean for v in flat]
        return centred, sum(v * v for v in centred) / 6 + eps

    h = [float(a * b) for a, b in zip(g.flatten(), weight.flatten(), strict=True)]
    for rules in (RELP, DEEPLIFT):
        with propagate(rules) as report:
            y = norm(leaf)
        if rules.needs_reference:
            with report.reference():
                norm(other)
        (found,) = torch.autograd.grad(y, leaf, g)
        (c, v), (c_, v_) = parts(x), parts(other if rules is DEEPLIFT else x)
        r, r_ = v**-0.5, v_**-0.5
        expected = [a * (r + r_) / 2 for a in h]
        if rules is DEEPLIFT:
            slope = (r_ - r) / (v_ - v) if abs(v_ - v) > 1e-6 * v else -(((v + v_) / 2) ** -1.5) / 2
            middle = [(a + b) / 2 for a, b in zip(c, c_, strict=True)]
            pull = slope * sum(a * b for a, b in zip(h, middle, strict=True))
            expected = [e + pull * 2 * m / 6 for e, m in zip(expected, middle, strict=True)]
        if kind == "layer":
            expected = [e - sum(expected) / 6 for e in expected]
        close = torch.tensor(expected, dtype=torch.float64).view(2, 3)
        torch.testing.assert_close(found, close, rtol=1e-6, atol=1e-6 * float(close.abs().max()))


def test_attention_kernel_and_written_out_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    other = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()

    def fused(t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(t * 2, t, t.flip(-1), is_causal=True)

    def written(t: Tensor) -> Tensor:
        scores = (t * 2) @ t.mT / 2
        return scores.masked_fill(~mask, -math.inf).softmax(-1) @ t.flip(-1)

    for rules in (GRADIENT, RELP, CP_LRP, ATTN_LRP, DEEPLIFT):
        reference = other if rules.needs_reference else None
        y, c = coefficient(fused, x, rules, reference)
        _, d = coefficient(written, x, rules, reference)
        assert torch.equal(y, fused(x))
        torch.testing.assert_close(c, d)


def test_a_module_counts_as_one_operation() -> None:
    module = nn.Sequential(nn.Linear(4, 4), NewGELUActivation())
    x = torch.randn(3, 4, requires_grad=True)
    with propagate(RELP, root=module) as report:
        module(x)
    frame = report.to_dataframe()
    assert frame[frame.kind == "activation"].to_dict("records") == [
        {"operation": "NewGELUActivation", "kind": "activation", "rule": "identity",
         "module": "1", "count": 1}
    ]  # fmt: skip
    assert set(frame.kind) == {"activation", "linear"}


def test_coefficients_have_no_derivative_of_their_own() -> None:
    """What they were computed from is detached: a second derivative would be a part of one."""
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1))
    x = torch.randn(3, 4, requires_grad=True)

    def twice(y: Tensor) -> Tensor:
        (c,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(c.square().sum(), x)[0]

    for rules in (RELP, CP_LRP, ATTN_LRP, GIM):
        with propagate(rules, root=module):
            y = module(x)
        with pytest.raises(RuntimeError, match="must build no graph, .*got create_graph=True"):
            twice(y)
    with propagate(GRADIENT, root=module):
        y = module(x)
    torch.testing.assert_close(twice(y), twice(module(x)))


def layer(seed: int, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Input `[row, in]`, weight `[in, out]`, bias, and a coefficient at the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, w = draw(5, 4), draw(4, 3)
    x[1] = 0  # z is the bias, or 0
    x[2] *= 1e-12
    x[3] *= 1e4
    return x, w, draw(3) if bias else None, draw(5, 3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epsilon", [1e-6, 0.3])
def test_the_epsilon_rule_entry_by_entry(seed: int, bias: bool, epsilon: float) -> None:
    x, w, b, g = layer(seed, bias=bias)
    rules = GRADIENT.with_(linear="epsilon", epsilon=epsilon)
    leaf = x.clone().requires_grad_()
    with propagate(rules):
        y = F.linear(leaf, w.T, b)
    (found,) = torch.autograd.grad(y, leaf, g)
    for row in range(len(x)):
        expected = epsilon_rule(x[row], w, b, g[row], epsilon=epsilon)
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gamma", [0.25, 100.0])
@pytest.mark.parametrize("spelling", ["linear", "matmul", "conv"])
def test_the_gamma_rule_entry_by_entry(seed: int, bias: bool, gamma: float, spelling: str) -> None:
    """Relevances: where an input is 0 its contribution has no sign, its coefficient no meaning.

    Ours differs from zennit's `Gamma` in two respects: the bias counts once, not 1 + γ times where
    it has the output's sign, and the denominator, which is never smaller than the output, needs no
    stabiliser (there 1e-6).
    """
    x, w, b, g = layer(seed, bias=bias and spelling != "matmul")
    leaf = x.clone().requires_grad_()
    with propagate(GRADIENT.with_(linear="gamma", gamma=gamma)):
        if spelling == "linear":
            y = F.linear(leaf, w.T, b)
        elif spelling == "matmul":
            y = leaf @ w
        else:
            y = F.conv1d(leaf[..., None], w.T[..., None], b)[..., 0]
    (found,) = torch.autograd.grad(y, leaf, g)
    for row in range(len(x)):
        expected = gamma_rule(x[row], w, b, g[row], gamma=gamma, epsilon=0.0, raise_bias=False)
        torch.testing.assert_close(
            (x * found)[row], x[row] * expected, rtol=1e-9, atol=1e-12 * gamma
        )


def test_the_gamma_rule_of_a_scaled_product() -> None:
    x, w, b, g = layer(0, bias=True)
    assert b is not None
    found = []
    for function in (
        lambda t: torch.addmm(b, t, w, alpha=3),
        lambda t: F.linear(t, 3 * w.T, b),
    ):
        leaf = x.clone().requires_grad_()
        with propagate(GRADIENT.with_(linear="gamma", gamma=0.5)):
            y = function(leaf)
        found.append(torch.autograd.grad(y, leaf, g)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["max", "min", "amax", "maximum", "max_pool1d"])
@pytest.mark.parametrize("seed", SEEDS)
def test_selections_between_two_runs_by_hand(name: str, seed: int) -> None:
    """Own choice i, the other's j: i gets a / (a + b), j the rest; a, b how far they are apart."""
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    other[0] = x[0]
    other[1] = x[1] + 1e-12
    x[2] = 1.0  # equal entries
    sign = -1 if name == "min" else 1

    def choose(t: Tensor) -> Tensor:
        if name == "maximum":
            return torch.maximum(t[:, 0], t[:, 1])
        if name == "max_pool1d":
            return F.max_pool1d(t[None], 4)[0, :, 0]
        return t.amax(-1) if name == "amax" else getattr(t, name)(-1).values

    _, found = coefficient(choose, x, DEEPLIFT, other)
    assert float(((other - x) * found).sum()) == pytest.approx(
        float((choose(other) - choose(x)).sum())
    )
    width = 2 if name == "maximum" else 4
    for row in range(len(x)):
        own, there = (sign * x[row, :width]).tolist(), (sign * other[row, :width]).tolist()
        if row == 2:  # which of equals is torch's choice
            assert float(found[row].sum()) == pytest.approx(1)
            continue
        i, j = own.index(max(own)), there.index(max(there))
        a, b = own[i] - own[j], there[j] - there[i]
        share = a / (a + b) if i != j else 1.0
        expected = torch.zeros(4, dtype=torch.float64)
        expected[j] += 1 - share
        expected[i] += share
        torch.testing.assert_close(found[row], expected)


def test_rules_by_place() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.GELU()), nn.GELU()).double()
    x = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    found = {}
    for rules in (RELP, RELP.at("0", activation="derivative"), RELP.with_(activation="derivative")):
        leaf = x.clone().requires_grad_()
        with propagate(rules, root=model):
            y = model(leaf)
        found[rules.name] = torch.autograd.grad(y.sum(), leaf)[0]
    h = model[0][0](x).detach()
    a = F.gelu(h)
    leaf = h.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(leaf).sum(), leaf)
    ratio = F.gelu(a) / a
    w = model[0][0].weight.detach()
    torch.testing.assert_close(found["RELP"], (ratio * a / h) @ w)
    torch.testing.assert_close(found["RELP(0: activation=derivative)"], (ratio * slope) @ w)
