"""Each rule as a formula: the forward value is torch's own, the backward coefficient is chosen.

Which kind of operation gets which by what name is the table of `relp.rulebook`.

Notation: `x`, `y` are an operation's input and output in the differentiated run, `x_`, `y_` the
same in the reference run (for the rules that compare two runs), `g` the coefficient that arrives
at the output. A rule returns `y` as torch computed it, attached to a function that turns `g` into
the coefficient at the input. Formulas for one form of operation take the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "STATISTIC_SLOPES", "Comparison", "Keep", "Reference", "Remainder", "attach", "constant",
    "derivative", "division_constant", "division_secant", "epsilon", "extreme_secant",
    "gamma", "graft", "half", "identity", "layer_norm_constant", "layer_norm_secant",
    "log_softmax_constant", "log_softmax_secant", "logsumexp_secant", "midpoint_bilinear",
    "midpoint_gate", "midpoint_matmul", "own", "rescale", "softmax_secant", "softmax_softer",
    "statistic_secant", "vector_norm_secant", "wide",
]  # fmt: skip

PullBack = Callable[..., Sequence[Tensor | None]]
"""From the coefficient at the output (and what was saved) to those at the inputs."""
Keep = Callable[[Any, Any], Sequence[Tensor]]
Product = Callable[[Tensor, Tensor], Tensor]


class _Attach(torch.autograd.Function):
    """Returns `value` untouched; its backward is `pull_back` of what was saved."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, pull_back: PullBack, count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.pull_back = pull_back
        ctx.like = [(x.shape, x.dtype) for x in tensors[:count]]
        # torch refuses to hand these out again if they were overwritten in place meanwhile
        ctx.save_for_backward(*tensors[count:])
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if torch.is_grad_enabled():  # what was saved is detached: it would be a part of one only
            raise RuntimeError(
                "the backward under rules must build no graph, as their coefficients have no "
                "derivative of their own; got create_graph=True; leave it out, and take second "
                "derivatives without rules, or with GRADIENT"
            )
        # The formulas are plain arithmetic: no rule may be applied to them in turn.
        with torch._C.DisableTorchFunction():
            g, saved = wide(g), [wide(t) for t in ctx.saved_tensors]
            grads = [
                # A factor that was broadcast gets the sum of what its copies get.
                None if grad is None else grad.sum_to_size(shape).to(dtype)
                for grad, (shape, dtype) in zip(ctx.pull_back(g, *saved), ctx.like, strict=True)
            ]
        return (None, None, None, *grads, *[None] * len(saved))


def attach(
    value: Tensor, pull_back: PullBack, inputs: Sequence[Tensor], saved: Sequence[Tensor] = ()
) -> Tensor:
    """`value`, differentiable: `pull_back(g, *saved)` gives a coefficient for each of `inputs`."""
    if any(t.is_complex() for t in inputs):
        raise ValueError(
            "a rule is for real numbers; an operation got complex ones that carry relevance; write "
            "it with their real and imaginary parts"
        )
    kept = [t.detach() for t in saved]
    return _Attach.apply(value.detach(), pull_back, len(inputs), *inputs, *kept)


def graft(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one tensor with the coefficients of another (an equal one, decomposed)."""
    return attach(value, lambda g: (g,), (surrogate,))


def wide(x: Tensor) -> Tensor:
    """Half precision as float32: differences between two runs would drown in its rounding."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def own(x: Tensor, y: Tensor, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """A rule from outside: `formula(g, x, y)` is the coefficient at x."""
    return attach(y, lambda g, x, y: (formula(g, x, y),), (x,), (x, y))


class Reference:
    """An operation's operands and result in the reference run; filled in before the backward."""

    def __init__(self, name: str, keep: Keep) -> None:
        self.name = name
        self.keep = keep
        """From the call in the reference run and its result to the tensors to fill in."""
        self.comparison = Comparison()
        self._tensors: tuple[Tensor, ...] | None = None
        self._versions: tuple[int, ...] = ()

    @property
    def filled(self) -> bool:
        """True once the reference run has passed here."""
        return self._tensors is not None

    def fill(self, *tensors: Tensor) -> None:
        """Keeps what the reference run had here."""
        self._tensors = tuple(t.detach() for t in tensors)
        self._versions = tuple(t._version for t in tensors)

    def __call__(self, *own: Tensor) -> tuple[Tensor, ...]:
        """What the reference run had here; `own`: the same of the differentiated run.

        Raises:
            RuntimeError: there was no reference run, or it overwrote its tensors afterwards.
        """
        if self.comparison.with_itself:
            return own
        if self._tensors is None:
            raise RuntimeError(
                f"rules that compare two runs need the reference run before the backward; "
                f"operation {self.name!r} has seen one run only; run the other input inside "
                "`with report.reference():`"
            )
        if self._versions != tuple(t._version for t in self._tensors):
            raise RuntimeError(
                f"a rule needs an operation's tensors unchanged after it; those of {self.name!r} "
                "were overwritten in place; write the model's next step as y = f(x)"
            )
        return tuple(wide(t) for t in self._tensors)


class Comparison:
    """With what a run is compared when its coefficients are taken: the reference run, or itself.

    A secant between a run and itself is the derivative there.
    """

    with_itself = False


def constant(x: Tensor, y: Tensor, *_: Any) -> Tensor:
    """Carries no relevance: what depends on it takes it as a number.

    Source: for softmax the AH-rule, for statistics the LN-rule (Ali et al. 2022, arXiv:2202.07304).
    """
    return y.detach()


# -- linear: the whole result, the input, its product with the weight, the weight, a size ----------


def epsilon(
    whole: Callable[[], Tensor], x: Tensor, call: Product, w: Tensor | None, size: float
) -> Tensor:
    """The derivative, dampened where the output is small: g·z / (z + ε·sign z).

    Source: Bach et al. 2015; the ε-rule of Montavon et al. 2019.
    """
    product = whole()

    def pull_back(g: Tensor, z: Tensor) -> tuple[Tensor]:
        return (g * z.abs() / (z.abs() + size),)

    return attach(product, pull_back, (product,), (product,))


def gamma(whole: Callable[[], Tensor], x: Tensor, call: Product, w: Tensor, size: float) -> Tensor:
    """Contributions x_i·w_ij of the sign of the output z_j count 1 + γ times, then are rescaled.

    The coefficient is Σ_j (w_ij + γ·w_ij^s) · g_j·z_j / (z_j + γ·Σ_i (x_i·w_ij)^s), with s the sign
    of z_j and w_ij^s the weight where x_i·w_ij has that sign, else 0. `call(x, w)` is linear in
    both; a bias is part of z only. Source: the γ-rule of Montavon et al. 2019, for inputs of both
    signs as in zennit (arXiv:2106.13200), which also scales the bias, and adds a stabiliser.
    """
    z = _value(whole)

    def pull_back(g: Tensor, x: Tensor, w: Tensor, z: Tensor) -> tuple[Tensor]:
        up, down = (x.clamp(min=0), x.clamp(max=0)), (w.clamp(min=0), w.clamp(max=0))
        raised = call(up[0], down[0]) + call(up[1], down[1])
        lowered = call(up[0], down[1]) + call(up[1], down[0])
        whole = z + size * torch.where(z >= 0, raised, lowered)
        s = g * torch.where(whole == 0, 1.0, z / torch.where(whole == 0, 1.0, whole))
        s_up, s_down = torch.where(z >= 0, s, 0.0), torch.where(z >= 0, 0.0, s)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()

            def back(weight: Tensor, s: Tensor) -> Tensor:
                return torch.autograd.grad(call(leaf, weight), leaf, s)[0]

            same = back(down[0], s_up) + back(down[1], s_down)
            opposite = back(down[1], s_up) + back(down[0], s_down)
            return (back(w, s) + size * torch.where(x >= 0, same, opposite),)

    return attach(z, pull_back, (x,), (x, w, z))


# -- activation, exponent: one input, elementwise --------------------------------------------------


def identity(
    x: Tensor, y: Tensor, function: Callable[[Tensor], Tensor], uniform: bool, _: Reference
) -> Tensor:
    """Coefficient (y - f(0)) / x, at x = 0 its limit f'(0). `uniform`: f is the same everywhere.

    f(0) is 0 for GELU, SiLU, ReLU and tanh; elsewhere (sigmoid) it acts as a bias, which carries
    no relevance. Source: Jafari et al. 2024, arXiv:2406.07592 (Identity-rule).
    """

    def pull_back(g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor]:
        at_zero, slope = _at_zero(function, x.new_zeros(1) if uniform else x)
        if bool((at_zero != 0).any()):  # a difference of rounded numbers
            zero = torch.zeros_like(x)
            return (g * _secant(zero, x, at_zero.expand_as(x), y, function),)
        # below this |x| the quotient of two rounded numbers says nothing; the limit does
        tiny = torch.finfo(x.dtype).tiny
        return (g * torch.where(x.abs() <= tiny, slope, y / x),)

    return attach(y, pull_back, (x,), (x, y))


def rescale(
    x: Tensor, y: Tensor, function: Callable[[Tensor], Tensor], _: bool, reference: Reference
) -> Tensor:
    """Coefficient (y' - y) / (x' - x); where x' is close to x, the derivative between them.

    Source: DeepLIFT's Rescale rule, arXiv:1704.02685.
    """
    rounded = y.dtype in (torch.float16, torch.bfloat16)

    def pull_back(g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor]:
        x_, y_ = reference(x, y)
        if rounded:  # their difference would be mostly rounding
            y, y_ = function(x), function(x_)
        return (g * _secant(x, x_, y, y_, function),)

    return attach(y, pull_back, (x,), (x, y))


def _secant(
    x: Tensor, x_: Tensor, y: Tensor, y_: Tensor, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """(y' - y) / (x' - x), and f' midway where rounding would swamp that quotient."""
    if x_ is x:
        return derivative(function, x)
    step = x_ - x
    quotient = (y_ - y) / torch.where(step == 0, 1.0, step)
    middle = derivative(function, (x + x_) / 2)
    # With |step| = t the quotient is off by about eps / t, the derivative midway by about t^2 / 24:
    # both are small at t = eps ** (1/3). At a kink the two differ by more than rounding explains,
    # and the quotient is right: a piecewise linear function is as exact as its input.
    eps = torch.finfo(x.dtype).eps
    near = step.abs() < eps ** (1 / 3) * (1 + x.abs())
    smooth = (y_ - y - middle * step).abs() <= eps ** (2 / 3) * (1 + y.abs())
    return torch.where((step == 0) | (near & smooth), middle, quotient)


def derivative(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """f' at each entry of `at`, for an elementwise function."""
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        return torch.autograd.grad(function(at).sum(), at)[0]


def _at_zero(function: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """f(0) and f'(0), in the shape of `like`."""
    with torch.enable_grad():
        zero = torch.zeros_like(like).requires_grad_()
        value = function(zero)
        (slope,) = torch.autograd.grad(value.sum(), zero)
    return value.detach(), slope


# -- products: gate (elementwise) and bilinear -----------------------------------------------------


def half(whole: Callable[[], Tensor], factors: Sequence[Tensor], *_: Any) -> Tensor:
    """The product rule with half the coefficient for each factor, so that x·c adds up once.

    Source: arXiv:2406.07592, arXiv:2402.05602.
    """
    product = whole()
    return attach(product, lambda g: (g / 2,), (product,))


def midpoint_gate(
    whole: Callable[[], Tensor], factors: Sequence[Tensor], reference: Reference
) -> Tensor:
    """Each factor gets the mean of the other over the two runs: Δ(ab) = Δa·b̄ + ā·Δb exactly."""

    def pull_back(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a_, b_ = reference(a, b)
        return g * _midway(b, b_), g * _midway(a, a_)

    return attach(_value(whole), pull_back, factors, factors)


def midpoint_bilinear(
    whole: Callable[[], Tensor], factors: Sequence[Tensor], call: Product, reference: Reference
) -> Tensor:
    """`midpoint_gate` for any function that is linear in each of its two factors."""

    def pull_back(g: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(own, reference(*own), strict=True)
        middle = [_midway(x, x_).detach().requires_grad_() for x, x_ in pairs]
        with torch.enable_grad():
            return torch.autograd.grad(call(*middle), middle, g)

    return attach(_value(whole), pull_back, factors, factors)


def midpoint_matmul(
    whole: Callable[[], Tensor], factors: Sequence[Tensor], _: Product, reference: Reference
) -> Tensor:
    """`midpoint_bilinear` of `a @ b` for operands of two or more axes, without a second product."""

    def pull_back(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a_, b_ = reference(a, b)
        return g @ _midway(b, b_).mT, _midway(a, a_).mT @ g

    return attach(_value(whole), pull_back, factors, factors)


def _midway(x: Tensor, x_: Tensor) -> Tensor:
    """The mean over the two runs, which may be one."""
    return x if x_ is x else (x + x_) / 2


def _value(call: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """torch's own result, without a graph."""
    with torch.no_grad():
        return call(*operands)


# -- softmax ---------------------------------------------------------------------------------------


def softmax_softer(x: Tensor, y: Tensor, dim: int, _: Reference) -> Tensor:
    """The derivative of softmax where it is less sure of itself: p·(g - Σ p·g), p at temperature 2.

    Source: GIM, arXiv:2505.17630, as its authors' code has it (without the factor 1/2).
    """

    def pull_back(g: Tensor, x: Tensor) -> tuple[Tensor]:
        p = (x / 2).softmax(dim)
        return (p * (g - (g * p).sum(dim, keepdim=True)),)

    return attach(y, pull_back, (x,), (x,))


def softmax_secant(x: Tensor, y: Tensor, dim: int, reference: Reference) -> Tensor:
    """y = exp(z) with z = x - lse(x), lse the log of the sum of exp(x): each step by its secant.

    Δy_i = M(y_i, y'_i)·Δz_i with M the logarithmic mean, Δz_i = Δx_i - Δlse, and
    Δlse = Σ_j w_j·Δx_j with w_j = M(e_j, e'_j) / M(S, S'), e = exp(x), S = Σe. M adds up to no
    more than the M of the sums, so Σ w ≤ 1: no coefficient exceeds what arrives. (Splitting
    y = e·(1/S) by midpoints is as exact on paper, but its terms grow with S'/S and cancel: with
    attention scores that differ by 20 between the runs, nothing is left of float32.)
    What is masked out in both runs gets 0.
    """
    rounded = y.dtype in (torch.float16, torch.bfloat16)

    def pull_back(g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor]:
        x_, y_ = reference(x, y)
        if x_ is x:
            weighted = g * y
            return (weighted - y * weighted.sum(dim, keepdim=True),)
        if rounded:
            y, y_ = x.softmax(dim), x_.softmax(dim)
        step = x_ - x
        shift = x_.logsumexp(dim, keepdim=True) - x.logsumexp(dim, keepdim=True)
        weighted = g * _logarithmic_mean(y_, y, step - shift)
        share = _shares(y, y_, step, shift)
        return (weighted - share * weighted.sum(dim, keepdim=True),)

    return attach(y, pull_back, (x,), (x, y))


def log_softmax_constant(x: Tensor, y: Tensor, dim: int, _: Reference) -> Tensor:
    """x - lse(x): the log of the sum, the only part that is not linear, is constant."""
    return attach(y, lambda g: (g,), (x,))


def log_softmax_secant(x: Tensor, y: Tensor, dim: int, reference: Reference) -> Tensor:
    """Δy_i = Δx_i - Δlse with Δlse = Σ_j w_j·Δx_j, w as in `softmax_secant`."""

    def pull_back(g: Tensor, x: Tensor) -> tuple[Tensor]:
        (x_,) = reference(x)
        shift = x_.logsumexp(dim, keepdim=True) - x.logsumexp(dim, keepdim=True)
        share = _shares(x.softmax(dim), x_.softmax(dim), x_ - x, shift)
        return (g - share * g.sum(dim, keepdim=True),)

    return attach(y, pull_back, (x,), (x,))


def logsumexp_secant(
    x: Tensor, y: Tensor, dims: Any, keepdim: bool, reference: Reference
) -> Tensor:
    """Δlse = Σ_j w_j·Δx_j, w as in `softmax_secant`."""

    def pull_back(g: Tensor, x: Tensor) -> tuple[Tensor]:
        (x_,) = reference(x)
        total, total_ = x.logsumexp(dims, keepdim=True), x_.logsumexp(dims, keepdim=True)
        share = _shares((x - total).exp(), (x_ - total_).exp(), x_ - x, total_ - total)
        return (share * (g if keepdim else g.reshape(total.shape)),)

    return attach(y, pull_back, (x,), (x,))


def _shares(y: Tensor, y_: Tensor, step: Tensor, shift: Tensor) -> Tensor:
    """w_j = M(e_j, e'_j) / M(S, S'), from y = e/S, with `shift` = log(S'/S).

    Both sums are divided by the larger one, so that nothing overflows.
    """
    size = shift.abs()
    less = (-size).exp()
    larger = torch.where(shift >= 0, y_, y_ * less)
    smaller = torch.where(shift >= 0, y * less, y)
    scale = torch.where(size == 0, 1.0, size / -torch.expm1(-size))
    return scale * _logarithmic_mean(larger, smaller, step)


def _logarithmic_mean(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """(a - b) / log(a / b), by its series where a is close to b; 0 where the ratio is undefined."""
    near = log_ratio.abs() < 1e-2
    series = (a * b).sqrt() * (1 + log_ratio.square() / 24)
    mean = torch.where(near, series, (a - b) / torch.where(near, 1.0, log_ratio))
    return torch.where(log_ratio.isfinite(), mean, 0.0)


# -- norm ------------------------------------------------------------------------------------------


def layer_norm_constant(
    x: Tensor,
    y: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    eps: float,
    centre: bool,
    _: Reference,
) -> Tensor:
    """The statistic 1/σ is a constant, centring is linear (LN-rule, arXiv:2202.07304)."""

    def pull_back(g: Tensor, x: Tensor) -> tuple[Tensor]:
        h = _weighted(g, weight) * _inverse_scale(x, dims, eps, centre)[1]
        return (h - h.mean(dims, keepdim=True) if centre else h,)

    return attach(y, pull_back, (x,), (x,))


def layer_norm_secant(
    x: Tensor,
    y: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    eps: float,
    centre: bool,
    reference: Reference,
) -> Tensor:
    """y = c·r with c the centred input and r = 1/σ: midpoints for the product, r by its secant.

    r' - r = -(v' - v)·(r r')² / (r + r') and v' - v = mean(2 c̄·Δc), all without a small divisor.
    """

    def pull_back(g: Tensor, x: Tensor) -> tuple[Tensor]:
        (x_,) = reference(x)
        c, r = _inverse_scale(x, dims, eps, centre)
        c_, r_ = (c, r) if x_ is x else _inverse_scale(x_, dims, eps, centre)
        h, middle = _weighted(g, weight), _midway(c, c_)
        slope = -((r * r_) ** 2) / (r + r_)
        h = h * _midway(r, r_) + 2 * middle * (h * middle).sum(dims, keepdim=True) * slope / (
            _count(x, dims)
        )
        return (h - h.mean(dims, keepdim=True) if centre else h,)

    return attach(y, pull_back, (x,), (x,))


def _weighted(g: Tensor, weight: Tensor | None) -> Tensor:
    return g if weight is None else g * weight.detach()


def _inverse_scale(
    x: Tensor, dims: tuple[int, ...], eps: float, centre: bool
) -> tuple[Tensor, Tensor]:
    """The (centred) input and one over its root mean square."""
    c = x - x.mean(dims, keepdim=True) if centre else x
    return c, torch.rsqrt(c.square().mean(dims, keepdim=True) + eps)


def _count(x: Tensor, dims: tuple[int, ...]) -> int:
    count = 1
    for d in dims:
        count *= x.shape[d]
    return count


STATISTIC_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # (y' - y) / (x' - x) in terms of the two results
    "rsqrt": lambda y, y_: -((y * y_) ** 2) / (y + y_),
    "sqrt": lambda y, y_: 1 / (y + y_),
    "reciprocal": lambda y, y_: -y * y_,
}


def statistic_secant(x: Tensor, y: Tensor, name: str, reference: Reference) -> Tensor:
    """The exact slope of rsqrt, sqrt or 1/x between two runs."""

    def pull_back(g: Tensor, y: Tensor) -> tuple[Tensor]:
        (y_,) = reference(y)
        return (g * STATISTIC_SLOPES[name](y, y_),)

    return attach(y, pull_back, (x,), (y,))


def vector_norm_secant(
    x: Tensor, y: Tensor, dims: Any, keepdim: bool, reference: Reference
) -> Tensor:
    """The Euclidean norm between two runs: Δ‖x‖ = Σ (x + x')·Δx / (‖x‖ + ‖x'‖)."""

    def pull_back(g: Tensor, x: Tensor) -> tuple[Tensor]:
        (x_,) = reference(x)
        size = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        total = size + torch.linalg.vector_norm(x_, dim=dims, keepdim=True)
        g = g if keepdim else g.reshape(size.shape)
        return (g * (x + x_) / torch.where(total == 0, 1.0, total),)

    return attach(y, pull_back, (x,), (x,))


def division_constant(call: Callable[[Tensor], Tensor], a: Any, b: Tensor, _: Reference) -> Tensor:
    """a / b with b as a number; `call(b)` divides a."""
    return call(b.detach())


def division_secant(
    call: Callable[[Tensor], Tensor], a: Any, b: Tensor, reference: Reference
) -> Tensor:
    """a / b as the product a·(1/b): midpoints, and -1/(b b') for 1/b."""
    y = _value(call, b)
    a = a if isinstance(a, Tensor) else torch.as_tensor(a, dtype=y.dtype, device=y.device)

    def pull_back(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a_, b_ = reference(a, b)
        return g * ((1 / b + 1 / b_) / 2), g * ((a + a_) / 2) * (-1 / (b * b_))

    return attach(y, pull_back, (a, b), (a, b))


# -- selection -------------------------------------------------------------------------------------


def extreme_secant(
    call: Callable[..., Tensor], operands: Sequence[Tensor], y: Tensor, reference: Reference
) -> Tensor:
    """max, min and max-pooling between two runs that may choose different entries.

    Own choice i, the other's j: with a = |x_i - x_j| and b = |x'_j - x'_i|, i gets the share
    a / (a + b) and j the rest. Then Δy = x'_j - x_i is explained exactly, by coefficients between
    0 and 1. (It is the integrated gradient of the maximum of the two, arXiv:1703.01365.)
    """

    def pull_back(g: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        other = reference(*own)
        # the entry that one run's choice has in the other run: the derivative, applied
        y, there = _applied(call, own, other)
        y_, here = _applied(call, other, own)
        a, b = (y - here).abs(), (y_ - there).abs()
        share = torch.where(a + b == 0, 1.0, a / torch.where(a + b == 0, 1.0, a + b))

        def back(at: Sequence[Tensor], g: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in at]
            with torch.enable_grad():
                return torch.autograd.grad(call(*leaves), leaves, g)

        both = zip(back(own, g * share), back(other, g * (1 - share)), strict=True)
        return tuple(one + two for one, two in both)

    return attach(y, pull_back, operands, operands)


def _applied(
    call: Callable[..., Tensor], at: Sequence[Tensor], to: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The call at some operands, and its derivative there applied to others.

    The derivative is linear in the coefficient that it pulls back: differentiate it by that. (The
    forward mode of torch would do, but loads TorchScript and warns of it.)
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in at]
        y = call(*leaves)
        u = torch.zeros_like(y, requires_grad=True)
        back = torch.autograd.grad(y, leaves, u, create_graph=True)
        (moved,) = torch.autograd.grad(back, u, list(to))
    return y.detach(), moved


# -- what no rule explains -------------------------------------------------------------------------


class Remainder:
    """What a module adds in the reference run because it branches otherwise than in the first.

    Between the same module forced onto the first run's branch and left to its own lies a jump of
    its output that no input explains; its share of the result is (jump · coefficient).
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self.operations: tuple[str, ...] = ()
        """Which operations chose differently."""
        self._jumps: tuple[Tensor, ...] = ()
        self._shares: dict[int, float] = {}

    @property
    def total(self) -> float:
        """In units of the result that was differentiated last."""
        return float(sum(self._shares.values()))

    def watch(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The same outputs, whose coefficients are multiplied by the jump when they come."""

        def watched(place: int, y: Tensor) -> Tensor:
            def pull_back(g: Tensor) -> tuple[Tensor]:
                if self._jumps:
                    self._shares[place] = float((g * self._jumps[place]).sum())
                return (g,)

            return attach(y, pull_back, (y,))

        return [watched(place, y) for place, y in enumerate(outputs)]

    def fill(self, operations: Sequence[str], outputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keeps by how much outputs (real, forced) differ from those on the first run's branch."""
        self.operations = tuple(dict.fromkeys(operations))
        self._jumps = tuple(wide(real) - wide(forced) for real, forced in outputs)
