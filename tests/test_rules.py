"""Each rule against its formula, written out slowly in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
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
    "silu": (F.silu, lambda x: 1 / (1 + math.exp(-x))),
    "relu": (F.relu, lambda x: float(x > 0)),
    "tanh": (torch.tanh, lambda x: math.tanh(x) / x if x else 1.0),
    # sigmoid(0) = 1/2 is a bias: what is left is tanh(x / 2) / 2
    "sigmoid": (torch.sigmoid, lambda x: math.tanh(x / 2) / 2 / x if x else 0.25),
    "new_gelu": (
        NewGELUActivation(),
        lambda x: 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "quick_gelu": (ACT2FN["quick_gelu"], lambda x: 1 / (1 + math.exp(-1.702 * x))),
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
    x = torch.tensor([-6.0, -1.3, -1e-3, -1e-30, 0.0, 1e-37, 1e-30, 2e-4, 0.7, 5.0], dtype=dtype)
    y, c = coefficient(function, x, RELP)
    assert torch.equal(y, function(x))
    expected = torch.tensor([ratio(v) for v in x.tolist()], dtype=torch.float64)
    # sigmoid(x) - 1/2 loses digits near 0: rounding of the value itself
    close = 2e-4 if name == "sigmoid" and dtype == torch.float32 else 1e-6
    keep = x.abs() > 1e-5 if name == "sigmoid" else torch.ones_like(x, dtype=torch.bool)
    keep |= x == 0
    torch.testing.assert_close(c.double()[keep], expected[keep], rtol=close, atol=close)


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


def test_softer_softmax_is_the_derivative_at_temperature_two() -> None:
    x = torch.tensor([[1.0, -2.0, 4.0]], dtype=torch.float64)
    g = torch.tensor([[0.3, 1.0, -2.0]], dtype=torch.float64)
    leaf, warm = x.clone().requires_grad_(), x.clone().requires_grad_()
    with propagate(GIM):
        y = leaf.softmax(-1)
    assert torch.equal(y, x.softmax(-1))
    # d softmax(x / 2) / dx holds the factor 1/2 that GIM leaves out
    (expected,) = torch.autograd.grad((warm / 2).softmax(-1), warm, 2 * g)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, g)[0], expected)


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
