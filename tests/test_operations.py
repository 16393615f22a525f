"""Every kind of operation: torch's values, exact differences between two runs, one's own rules."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_overridable_functions, wrap_torch_function

from relp import (
    CP_LRP,
    DEEPLIFT,
    GIM,
    GRADIENT,
    PRESETS,
    RELP,
    Rules,
    UnknownOperationError,
    coverage,
    propagate,
    register,
)
from relp.operations import label, name_of
from relp.propagation.decompositions import WRITTEN_OUT

ROOT = Path(__file__).parent.parent


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def attention(x: Tensor, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, x.flip(-1), x * 2, **kwargs)


HEADS = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
ENCODER = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()

# [2, 3, 4] in, positive where a function wants it; the name is what torch calls the operation
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, weights(5, 4), weights(5)),
    "linear with a dependent weight": lambda x: F.linear(x, x[0], x[0, :, 0]),
    "conv1d": lambda x: F.conv1d(x, weights(2, 3, 2), weights(2)),
    "conv2d": lambda x: F.conv2d(x[:, None], weights(2, 1, 2, 2), padding=1),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x, weights(3, 2, 2)),
    "einsum": lambda x: torch.einsum("bij,jk->bik", x, weights(4, 5)),
    "einsum of two": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "baddbmm": lambda x: torch.baddbmm(x, x @ weights(4, 3), x, beta=0.5, alpha=2),
    "addmm": lambda x: torch.addmm(weights(5), x[0], weights(4, 5), alpha=3),
    "addmm of two": lambda x: torch.addmm(x[0], x[0] @ weights(4, 3), x[1]),
    "bmm": lambda x: torch.bmm(x, x.mT),
    "matrix times vector": lambda x: x @ x[0, 0],
    "vector times matrix": lambda x: x[0, 0] @ x.mT,
    "outer": lambda x: torch.outer(x[0, 0], x[1, 1]),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([1, 2], [1, 2])),
    "bilinear": lambda x: F.bilinear(x, x.flip(0), weights(2, 4, 4), weights(2)),
    "attention": attention,
    "causal attention": lambda x: attention(x, is_causal=True, scale=0.3),
    "masked attention": lambda x: attention(x, attn_mask=weights(3, 3) > -0.5),
    "grouped attention": lambda x: F.scaled_dot_product_attention(
        x[:, None].repeat(1, 4, 1, 1), x[:, None].flip(-1).repeat(1, 2, 1, 1),
        x[:, None].repeat(1, 2, 1, 1), enable_gqa=True),
    "multi-head attention": lambda x: HEADS(x, x, x, need_weights=False)[0],
    "multi-head attention with weights": lambda x: HEADS(x, x, x)[0],
    "encoder layer": ENCODER,
    "layer norm": lambda x: F.layer_norm(x, (4,), weights(4), weights(4)),
    "adaptive layer norm": lambda x: F.layer_norm(x, (4,), x[0, 0], x[0, 1]),
    "rms norm": lambda x: F.rms_norm(x, (4,), weights(4)),
    "adaptive rms norm": lambda x: F.rms_norm(x, (4,), x[0, 0]),
    "group norm": lambda x: F.group_norm(x.mT, 2, weights(4), weights(4)),
    "instance norm": lambda x: F.instance_norm(x, weight=weights(3)),
    "batch norm": lambda x: F.batch_norm(x, weights(3), weights(3).square() + 1, weights(3)),
    "local response norm": lambda x: F.local_response_norm(x, 2),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "norm": lambda x: x / x.norm(p=2, dim=-1, keepdim=True),
    "vector norm": lambda x: torch.linalg.vector_norm(x, dim=(1, 2)),
    "cosine similarity": lambda x: F.cosine_similarity(x, x.flip(1), dim=-1),
    "standard deviation": lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True),
    "variance of a population": lambda x: x.var(-1, correction=0),
    "variance": lambda x: x.var((1, 2), unbiased=False),
    "softmax": lambda x: x.softmax(-1),
    "softmin": lambda x: F.softmin(x, -1),
    "log softmax": lambda x: F.log_softmax(x, -1),
    "cross entropy": lambda x: F.cross_entropy(x[0], torch.tensor([0, 2, 1]), reduction="none"),
    "logsumexp": lambda x: x.logsumexp(-1),
    "logsumexp over two axes": lambda x: torch.logsumexp(x, (1, 2), keepdim=True),
    "glu": lambda x: F.glu(x, -1),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "log sigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "hard swish": F.hardswish,
    "elu": F.elu,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "cube": lambda x: x**3,
    "softplus": F.softplus,
    "exp": torch.exp,
    "product": lambda x: x * x.flip(-1),
    "addcmul": lambda x: torch.addcmul(x, x, x.flip(0), value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.flip(0).exp()),
    "lerp": lambda x: torch.lerp(x, x.flip(0), x.sigmoid()),
    "division": lambda x: x / (1 + x.square()),
    "reciprocal": lambda x: (2 + x.tanh()).reciprocal() + 1 / (3 + x.tanh()),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "average pool": lambda x: F.adaptive_avg_pool1d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
    "complex": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(2, 3, 2, 2)) * torch.polar(
            torch.ones(2, dtype=torch.float64), weights(2))),
    "fourier": lambda x: torch.fft.fft(x.to(torch.complex128)).real,
    "scan": lambda x: torch.stack([x[:, 0] * x[:, 1].exp(), x.cumsum(1)[:, -1]]),
    "assignment": lambda x: torch.zeros(2, 3, 4, dtype=x.dtype).index_put(
        (torch.tensor([1]),), x[0]),
}  # fmt: skip


def both(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), other


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_are_torchs_and_differences_exact(name: str) -> None:
    function = OPERATIONS[name]
    for module in (HEADS, ENCODER):
        module.requires_grad_(False)
    x, other = both(0)
    plain = function(x)
    g = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (derivative,) = torch.autograd.grad(plain, x, g)
    for rules in PRESETS.values():
        with propagate(rules) as report:
            y = function(x)
            report.must_have_seen(y)
        assert torch.equal(y, plain)
        frame = report.to_dataframe()
        assert len(frame) and not frame["kind"].isin(["unknown", "opaque"]).any()
        if rules.needs_reference:
            with report.with_itself():
                (c,) = torch.autograd.grad(y, x, g, retain_graph=True)
            torch.testing.assert_close(c, derivative)
            with report.reference():
                after = function(other)
        if not y.requires_grad:  # all of it is constant
            assert rules.needs_reference is False
            continue
        (c,) = torch.autograd.grad(y, x, g, allow_unused=True, materialize_grads=True)
        assert c.isfinite().all()
        if rules is GRADIENT:
            torch.testing.assert_close(c, derivative)
    torch.testing.assert_close(((other - x) * c).sum(), ((after - y) * g).sum())


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_what_is_written_out_has_a_case(name: str) -> None:
    """Each is met in the cases above under its own name, not only by its parts."""
    met = set()
    for function in OPERATIONS.values():
        with propagate(GRADIENT) as report:
            function(both(0)[0])
        met |= set(report.to_dataframe()["operation"])
    assert name in met or name in ("addmv", "addr", "addbmm")


# -- whose an operation is -------------------------------------------------------------------------

FOREIGN = torch.library.Library("foreign", "DEF")
for signature, function in {
    # names that torch has for something else
    "mean(Tensor x) -> Tensor": lambda x: x**3,
    "size(Tensor x) -> Tensor": lambda x: x**3,
    "gelu(Tensor weight, Tensor input) -> Tensor": lambda weight, input: weight * input**3,
    "relu_(Tensor(a!) x) -> Tensor(a!)": lambda x: x.pow_(3),
}.items():
    FOREIGN.define(signature)
    FOREIGN.impl(signature.split("(")[0], function, "CompositeImplicitAutograd")


@torch.library.custom_op("foreign::sum", mutates_args=())
def summed(x: Tensor) -> Tensor:
    return x**3


summed.register_autograd(
    lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@wrap_torch_function(lambda x: (x,))
def mean(x: Tensor) -> Tensor:
    return x**3


@wrap_torch_function(lambda x, inplace=False: (x,))
def cube(x: Tensor, inplace: bool = False) -> Tensor:
    return x.pow_(3) if inplace else x**3


class Marked:
    """A function where torch has an attribute."""

    @property
    def T(self) -> Any:  # noqa: N802
        return None


OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "foreign::mean": (lambda x: torch.ops.foreign.mean(x), torch.ops.foreign.mean),
    "foreign::size": (lambda x: torch.ops.foreign.size.default(x), torch.ops.foreign.size.default),
    "foreign::sum": (lambda x: summed(x), summed),
    f"{__name__}.mean": (mean, mean),
}


@pytest.mark.parametrize("name", OTHERS)
def test_somebody_elses_operation_is_unknown_whatever_it_is_called(name: str) -> None:
    function, what = OTHERS[name]
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(UnknownOperationError) as error, propagate(CP_LRP):
        function(x)
    assert str(error.value) == (
        f"every operation that carries relevance must have a rule; {name!r} in the code under "
        "propagate has none; give it one with relp.register, or pass strict=False to let its "
        "derivative through and see it in the report"
    )
    with propagate(CP_LRP, strict=False) as report:
        function(x)
    assert report.to_dataframe()[["operation", "kind"]].values.tolist() == [[name, "unknown"]]
    # x³ / x, and torch's own of that name stays what it is
    with register(what, "activation"), propagate(CP_LRP) as report:
        y = function(x)
        (x.mean(), x.sum(), x.size())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([1.0, 4.0]))
    assert report.to_dataframe()[["operation", "kind"]].values.tolist() == [
        [name, "activation"], ["mean", "linear"], ["sum", "linear"]
    ]  # fmt: skip


def test_a_rule_for_torchs_operation_is_not_for_anothers() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with register(torch.mean, lambda g, x, y: 7 * g.expand_as(x)):
        with propagate(RELP):
            y = torch.ops.aten.mean(x) + x.mean() + torch.ops.aten.mean.default(x)
        assert torch.equal(torch.autograd.grad(y, x)[0], torch.tensor([21.0, 21.0]))
        with pytest.raises(UnknownOperationError, match="'foreign::mean'"), propagate(RELP):
            torch.ops.foreign.mean(x)


@pytest.mark.parametrize(
    ("what", "function"),
    [
        (torch.ops.foreign.relu_, torch.ops.foreign.relu_),
        (cube, lambda x: cube(x, True)),
        (cube, lambda x: cube(x, inplace=True)),
    ],
    ids=["by its name", "by position", "by keyword"],
)
def test_somebody_elses_operation_may_work_in_place(what: Any, function: Any) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with register(what, "activation"), propagate(RELP):
        hidden = x * 2
        y = function(hidden)
    assert y is hidden and torch.equal(y, torch.tensor([8.0, 64.0]))
    # (2x)³ / 2x · 2
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([8.0, 32.0]))


def test_operands_of_somebody_elses_operation_stay_where_they_are() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with register(torch.ops.foreign.gelu, "linear"), propagate(RELP):
        y = torch.ops.foreign.gelu(input=x, weight=torch.tensor([5.0, 1.0]))
    assert torch.equal(y, torch.tensor([5.0, 8.0]))


def test_torchs_own_names_are_bare() -> None:
    own = [f for functions in get_overridable_functions().values() for f in functions]
    own += [F.max_pool1d, torch.special.expit, torch.fft.rfft, torch.ops.aten.mul.Tensor]
    assert len(own) > 1000
    assert not [name_of(f) for f in own if {".", ":"} & set(name_of(f))]
    assert name_of(torch.ops.prims.mul) == "prims::mul"
    unlike = wrap_torch_function(lambda x: (x,))(lambda x: x)
    unlike.__module__, unlike.__qualname__ = "torchlike.functional", "mean"
    assert name_of(unlike) == "torchlike.functional.mean"
    for spelled in (torch.mul, Tensor.mul_, Tensor.__imul__, Tensor.__rmul__,
                    torch.ops.aten.mul, torch.ops.aten.mul_.Tensor):  # fmt: skip
        assert name_of(spelled) == "mul"
    attribute: Any = Tensor.T
    assert name_of(attribute.__get__) == "T"
    attribute = Marked.T
    assert name_of(attribute.__get__) == f"{__name__}.Marked.T"


# -- what hides its operations ---------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Hides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x)


@pytest.mark.parametrize("last", [True, False], ids=["last", "in between"])
def test_custom_autograd_functions_are_opaque(last: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), Hides(), *([] if last else [nn.GELU()]))
    x = torch.ones(1, 3)
    frame = coverage(model, x)
    assert frame.query("kind == 'opaque'")["operation"].tolist() == ["Twice"]
    with pytest.raises(UnknownOperationError, match="'Twice' before or in .* hides its operations"):
        coverage(model, x, strict=True)
    coverage(model, x, strict=True, rules=GRADIENT)  # all derivatives: nothing is guessed


class Stealthily(torch.autograd.Function):
    """Doubles its operand in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.detach().mul_(2)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class View(Twice):
    """Named like what torch makes anew."""


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda x: Twice.apply(x).tanh(),
    "first and last": lambda x: Twice.apply(x),
    "before a view": lambda x: Twice.apply(x)[:1].view(-1).tanh(),
    "written into a view": lambda x: written(x * 2).tanh(),
    "written into a view, read by another": lambda x: written(x * 2, other=True).tanh(),
    "before an activation module": lambda x: nn.GELU()(Twice.apply(x)),
    "named like a view": lambda x: View.apply(x).tanh(),
    "in a keyword": lambda x: torch.sub(x, other=Twice.apply(x)),
    "in a list": lambda x: torch.cat([x * 2, Twice.apply(x)]),
    "in an index": lambda x: torch.zeros(4).index_put((torch.arange(2),), Twice.apply(x)[:, 0]),
}


def written(y: Tensor, *, other: bool = False) -> Tensor:
    beside = y[:, 1:]
    Stealthily.apply(y[:, 0])
    return beside if other else y


@pytest.mark.parametrize("before", [False, True], ids=["leaf", "result"])
@pytest.mark.parametrize("name", HIDDEN)
def test_a_custom_function_is_refused_wherever_it_stands(name: str, before: bool) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    x = x.clone() if before else x
    with (
        pytest.raises(UnknownOperationError, match="hides its operations"),
        propagate(RELP) as report,
    ):
        report.must_have_seen(HIDDEN[name](x))
    # while what was there before needs no rule, whoever made it
    made = Twice.apply(x)
    view = made[:1]
    with propagate(RELP) as report:
        report.must_have_seen((made, view))
        report.must_have_seen(made.tanh() + view.tanh())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torchscript_is_opaque() -> None:
    script = torch.jit.script(nn.GELU())
    with pytest.raises(UnknownOperationError, match="hides its operations"):
        coverage(nn.Sequential(nn.Linear(3, 3), script, nn.Tanh()), torch.ones(1, 3), strict=True)


def test_recurrent_layers_of_one_call_are_opaque() -> None:
    model = nn.LSTM(3, 3)
    with pytest.raises(UnknownOperationError, match="'lstm' before or in 'LSTM' hides its operat"):
        coverage(model, torch.ones(2, 1, 3), strict=True)
    frame = coverage(model, torch.ones(2, 1, 3))
    assert frame.query("kind == 'opaque'")["operation"].tolist() == ["lstm"]
    coverage(model, torch.ones(2, 1, 3), rules=GRADIENT, strict=True)


def test_attention_modules_do_not_take_their_fast_path() -> None:
    """Without gradients torch would run them in one kernel; the reference run must not."""
    x, other = (t.detach() for t in both(0))
    for module in (HEADS, ENCODER):
        function = (lambda t: HEADS(t, t, t)[0]) if module is HEADS else ENCODER
        with propagate(DEEPLIFT, root=module) as report:
            y = function(x.requires_grad_())
        with report.reference():
            after = function(other)
        (c,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(((other - x) * c).sum(), (after - y).sum())


def test_views_and_assignments_are_no_mystery() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        first = y[:, 0]
        y[:, 1] = x[:, 1].exp()
        first.mul_(x[:, 2])
        return y.sigmoid() + first.mean()

    x, other = both(3)
    with propagate(DEEPLIFT) as report:
        y = function(x)
    with report.reference():
        after = function(other)
    (c,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(((other - x) * c).sum(), (after - y).sum())


UNKNOWN: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "norm of order 1": (lambda x: x / x.norm(p=1, dim=-1, keepdim=True), "of order 1"),
    "rounded division": (lambda x: torch.div(x, 2, rounding_mode="floor"), "with rounding"),
    "median of all": (lambda x: x.median(), "without an axis"),
    "dependent batch norm": (
        lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), weight=x[0, :, 0]),
        "with dependent weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_forms_that_no_rule_is_right_for_are_unknown(name: str) -> None:
    function, message = UNKNOWN[name]
    x = torch.rand(2, 3, 4, requires_grad=True)
    with propagate(GRADIENT):
        function(x)
    with pytest.raises(UnknownOperationError, match=f"{message}' in the code"), propagate(DEEPLIFT):
        function(x)


def test_a_product_of_three_is_refused_where_it_must_be_split() -> None:
    x = torch.ones(3, requires_grad=True)
    with propagate(GRADIENT):
        torch.einsum("i,i,i->", x, x * 2, x)
    with pytest.raises(UnknownOperationError) as error, propagate(CP_LRP):
        torch.einsum("i,i,i->", x, x * 2, x)
    assert str(error.value) == (
        "a product of dependent tensors must be of two to be split; 'einsum' in '' has 3; "
        "write it as products of two"
    )


def test_powers_are_of_the_kind_that_they_compute() -> None:
    x = torch.tensor([2.0, 4.0], requires_grad=True)
    with propagate(RELP) as report:
        for exponent in (-1, -0.5, 0.5, 2, 3):
            x.pow(exponent)
    found = report.to_dataframe().set_index("kind")["count"].to_dict()
    assert found == {"norm": 3, "gate": 1, "activation": 1}


def test_a_divisor_is_constant_on_either_side() -> None:
    x = torch.tensor([2.0, 4.0], requires_grad=True)
    for divide in (lambda a, b: a / b, lambda a, b: b.__rtruediv__(a)):
        with propagate(RELP):
            y = divide(x * 3, x * x)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 3 / x.detach() ** 2)


def test_train_mode_is_refused() -> None:
    x = torch.ones(4, 3)
    for drops in (lambda x: F.dropout(x), lambda x: torch.dropout(x, 0.1, train=True)):
        with pytest.raises(ValueError, match="must run in eval mode"), propagate(RELP):
            drops(x.requires_grad_() * 2)
    with propagate(RELP) as report:
        F.dropout(F.dropout(x * 2, 0.0), training=False)
    assert report.to_dataframe()["kind"].tolist() == ["linear"] * 2
    x = x.detach()
    for module in (nn.Dropout(), nn.BatchNorm1d(3)):
        with pytest.raises(ValueError, match=r"must run in eval mode under rules; .* model\.eval"):
            coverage(module.train(), x)
        coverage(module.eval(), x)


# -- one's own -------------------------------------------------------------------------------------


def test_registering_an_operation() -> None:
    x, other = both(0)
    x, other = x.detach().exp().requires_grad_(), other.exp()
    with register(torch.lgamma, "activation"):
        with propagate(DEEPLIFT) as report:
            y = torch.lgamma(x)
        with report.reference():
            after = torch.lgamma(other)
        (c,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close((other - x) * c, after - y)
        assert report.to_dataframe()["kind"].tolist() == ["activation"]
    with pytest.raises(UnknownOperationError, match="'lgamma'"), propagate(RELP):
        torch.lgamma(x)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(Twice.apply(x))


@pytest.mark.parametrize("rule", ["linear", "activation", "exponent"])
def test_registering_a_module(rule: str) -> None:
    x, other = both(0)
    x, other = x.detach().exp().requires_grad_(), other.exp()
    model = Doubling()
    (plain,) = torch.autograd.grad(torch.lgamma(2 * x).sum(), x)
    with register(Doubling, rule):
        for rules in (GRADIENT, RELP, DEEPLIFT):
            with propagate(rules, root=model) as report:
                y = model(x)
            if rules is DEEPLIFT and rule != "linear":
                with report.reference():
                    after = model(other)
                (c,) = torch.autograd.grad(y.sum(), x)
                torch.testing.assert_close((other - x) * c, (after - y).detach())
            elif rules is GRADIENT or rule == "linear":
                torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], plain)
            assert report.to_dataframe()[["operation", "kind"]].values.tolist() == [
                ["Doubling", rule]
            ] or (rule == "exponent" and rules is RELP and not y.requires_grad)


def test_registering_a_formula() -> None:
    x = torch.tensor([1.0, 4.0], requires_grad=True)
    with register(Doubling, lambda g, x, y: g * x):
        with propagate(RELP) as report:
            y = Doubling()(x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], x.detach())
        assert report.to_dataframe()["rule"].tolist() == ["formula"]
        with propagate(GRADIENT):
            y = Doubling()(x)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), x)[0], 2 * torch.digamma(2 * x).detach()
        )


def test_a_later_registration_hides_an_earlier_one() -> None:
    first = register(torch.lgamma, "linear")
    second = register(torch.lgamma, "activation")
    second.remove()
    x = torch.tensor([2.0], requires_grad=True)
    with propagate(RELP) as report:
        torch.lgamma(x)
    assert report.to_dataframe()["kind"].tolist() == ["linear"]
    first.remove()
    with pytest.raises(UnknownOperationError), propagate(RELP):
        torch.lgamma(x)


def test_what_cannot_be_registered() -> None:
    plain: Any = inspect.unwrap(register)
    with pytest.raises(ValueError, match="must be 'linear', 'activation', 'exponent' or a formula"):
        plain(torch.lgamma, "norm")
    with pytest.raises(TypeError, match="got the class Twice; register the nn.Module that holds"):
        plain(Twice, "linear")
    with pytest.raises(TypeError, match="got GELU; pass the class, not an instance"):
        plain(nn.GELU(), "linear")


# -- rules in some places --------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.GELU()) for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(
    ("rules", "derivatives"),
    [
        (RELP.at("blocks.1", activation="derivative"), [1]),
        (RELP.at("blocks.1?", activation="derivative"), [10, 11]),
        (RELP.at("*", activation="derivative").at("blocks.3.1", activation="identity"),
         [i for i in range(12) if i != 3]),
        (GRADIENT.at("blocks.*.1", activation="identity").at("blocks.0", activation="derivative"),
         [0]),
    ],
    ids=lambda value: value.name if isinstance(value, Rules) else "",
)  # fmt: skip
def test_rules_hold_where_they_are_said_to(rules: Rules, derivatives: list[int]) -> None:
    model = Blocks()
    frame = coverage(model, torch.ones(1, 3), rules=rules)
    found = dict(frame.query("kind == 'activation'")[["module", "rule"]].values.tolist())
    assert found == {
        f"blocks.{i}.1": "derivative" if i in derivatives else "identity" for i in range(12)
    }


def test_a_size_may_be_for_one_place() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.ones(1, 3)
    frame = coverage(model, x, rules=GRADIENT.at("1", linear="gamma", gamma=0.5))
    assert frame[["module", "rule"]].values.tolist() == [["0", "derivative"], ["1", "gamma"]]


def test_rules_for_a_place_that_is_not_there_are_an_error() -> None:
    model, x = Blocks(), torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"'blocks\.12' must fit the name of a module; it fits"):
        coverage(model, x, rules=RELP.at("blocks.12", activation="derivative"))
    with pytest.raises(ValueError, match="no 'softmax' that carries relevance was met in"):
        coverage(model, x, rules=RELP.at("blocks.3", softmax="constant"))
    without_root = propagate(RELP.at("blocks.3", activation="derivative"))
    with pytest.raises(ValueError, match=r"propagate\(rules, root=module\)"), without_root:
        model(x)


def test_an_activation_by_its_name_has_no_parts() -> None:
    class OwnGELU(nn.Module):
        def __init__(self, part: nn.Module | None = None) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            x = x if self.part is None else self.part(x)
            return x * x.sigmoid()

    x = torch.ones(1, 3)
    assert coverage(OwnGELU(), x)["operation"].tolist() == ["OwnGELU"]
    assert set(coverage(OwnGELU(nn.Linear(3, 3)), x)["operation"]) == {"linear", "mul", "sigmoid"}


# -- norms written out ---------------------------------------------------------------------------


class OwnRMSNorm(nn.Module):
    """As models write it: a square, a mean, a root and a product."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_steps_of_a_norm_are_no_gates() -> None:
    norm, (x, other) = OwnRMSNorm(), both(0)
    g = weights(*x.shape)
    (derivative,) = torch.autograd.grad(norm(x), x, g)
    for rules in (RELP.with_(norm="derivative"), GRADIENT.with_(gate="half")):
        with propagate(rules):
            y = norm(x)
        torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], derivative)
    with propagate(RELP.with_(norm="secant")) as report:
        y = norm(x)
    with report.reference():
        after = norm(other)
    (c,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(((other - x) * c).sum(), ((after - y) * g).sum())


def test_a_module_that_holds_a_norm_is_none() -> None:
    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = OwnRMSNorm(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.norm(x)

    frame = coverage(PreNorm(), torch.ones(1, 4), rules=GRADIENT.with_(gate="half"))
    assert frame.query("module == 'PreNorm'")["rule"].tolist() == ["half"]
    assert set(frame.query("module == 'norm'")["rule"]) == {"derivative"}


# -- arguments by position, and kinds in the report ------------------------------------------------


def coefficients(function: Callable[[Tensor], Tensor], x: Tensor, rules: Rules) -> Tensor:
    x = x.detach().requires_grad_()
    with propagate(rules):
        y = function(x)
    return torch.autograd.grad(y, x, weights(*y.shape))[0]


def test_norms_take_their_arguments_by_position() -> None:
    mean, scale, shift = weights(4), weights(4) + 2, weights(4)
    variance = weights(4).square() + 1
    for x, normalise in (
        (weights(5, 4), lambda x: F.batch_norm(x, mean, variance, scale, shift)),
        (weights(5, 4, 3), lambda x: F.instance_norm(x, mean, variance, scale, shift, False)),
    ):
        share = (scale / (variance + 1e-5).sqrt()).reshape(1, 4, *[1] * (x.dim() - 2))
        found = coefficients(normalise, x, RELP)
        torch.testing.assert_close(found, weights(*x.shape) * share)
    x, eps = weights(3, 4), 0.5
    found = coefficients(lambda x: torch.layer_norm(x, (4,), None, None, eps), x, RELP)
    g = weights(3, 4)
    root = (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(found, (g - g.mean(-1, keepdim=True)) / root)


@pytest.mark.parametrize("rules", [CP_LRP, RELP.with_(bilinear="half")])
def test_grouped_queries_hear_their_own_keys_and_values(rules: Rules) -> None:
    """Four query heads of two entries, two key/value heads that differ."""
    keys, values = weights(1, 2, 3, 2), weights(1, 2, 3, 2).flip(1)

    def grouped(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            x, x[:, :2] * keys, x[:, 2:] * values, enable_gqa=True
        )

    def repeated(x: Tensor) -> Tensor:
        k, v = ((part[:, [0, 0, 1, 1]]) for part in (x[:, :2] * keys, x[:, 2:] * values))
        return F.scaled_dot_product_attention(x, k, v)

    x = weights(1, 4, 3, 2)
    torch.testing.assert_close(coefficients(grouped, x, rules), coefficients(repeated, x, rules))


def test_an_exponent_of_ones_own_has_the_rule_of_exponents() -> None:
    x = weights(3).requires_grad_()
    with register(torch.lgamma, "exponent"), propagate(RELP) as report:
        y = torch.lgamma(x)
    assert not y.requires_grad
    assert report.to_dataframe()[["kind", "rule"]].values.tolist() == [["exponent", "constant"]]


def test_the_report_says_what_kind_each_operation_is() -> None:
    x = weights(2, 3, 4).requires_grad_()
    with propagate(GRADIENT) as report:
        attention(x)
    found = report.to_dataframe()
    kinds = dict(zip(found["kind"], found["rule"], strict=True))
    assert kinds.items() >= {"softmax": "derivative", "bilinear": "derivative"}.items()
    with propagate(RELP) as report:
        x.max(-1)
    assert report.to_dataframe().values.tolist() == [["max", "selection", "derivative", "", 1]]


class Listed(nn.Module):
    """Decides by numbers that it takes out of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        above = [v > 0 for v in x.tolist()]
        return torch.stack([v * (2 if up else 3) for v, up in zip(x, above, strict=True)]) * x


def test_decisions_that_are_lists_are_compared_entry_by_entry() -> None:
    one, same, other = (torch.tensor(v) for v in ([1.0, 2, -1], [0.5, 3, -2], [0.5, -3, -2]))
    for reference, remainder in ((same, 0.0), (other, 2 * 9.0 - 3 * 9.0)):
        x = one.clone().requires_grad_()
        module = Listed()
        with propagate(DEEPLIFT, root=module) as report:
            y = module(x).sum()
        with report.reference():
            y_ = module(reference).sum()
        (c,) = torch.autograd.grad(y, x)
        left = float(report.remainder()["remainder"].sum())
        assert float(((reference - one) * c).sum()) + left == pytest.approx(float(y_ - y.detach()))
        assert left == pytest.approx(-remainder)


def test_a_rule_that_does_not_exist_cannot_be_registered() -> None:
    with pytest.raises(ValueError) as error:
        register(torch.lgamma, "norm")
    assert str(error.value) == (
        "`rule` must be 'linear', 'activation', 'exponent' or a formula (g, x, y) -> coefficient; "
        "got 'norm'; see register's examples"
    )


# -- whose a registration is -----------------------------------------------------------------------


def tenfold(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 10 * g


def times(factor: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def formula(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return g * factor

    return formula


class Times:
    """A formula that keeps a number."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return g * self.factor


def by_global(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return g * FACTOR


FACTOR = 2.0
POINT = [0.3, 0.4]


def erfinv(rules: Rules) -> tuple[Tensor, str]:
    """The coefficients of one operation, and the name of the rules that gave them."""
    x = torch.tensor(POINT, requires_grad=True)
    with propagate(rules) as report:
        y = torch.erfinv(x)
    return torch.autograd.grad(y.sum(), x)[0], report.name


RATIO = torch.erfinv(torch.tensor(POINT)) / torch.tensor(POINT)


def test_rules_know_operations_of_their_own() -> None:
    for rules in (RELP, GIM):
        known = rules.with_operation(torch.erfinv, "exponent").with_operation(tenth, tenfold)
        with pytest.raises(UnknownOperationError, match="'erfinv'"):
            erfinv(rules)
        x = torch.tensor(POINT, requires_grad=True)
        with propagate(known) as report:
            assert not torch.erfinv(x).requires_grad
            y = tenth(x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([10.0, 10.0]))
        assert report.name == known.name
        with propagate(RELP.with_operation(nn.Module, "linear"), root=Doubling()) as report:
            Doubling()(x)
        assert report.to_dataframe()["operation"].tolist() == ["Doubling"]
    # and everywhere: in some modules, inside norms, and for the reference run
    rules = DEEPLIFT.with_operation(torch.erfinv, "activation").at("*", softmax="constant")
    assert rules.within("a").operations == rules.inside_norm().operations == rules.operations
    x, other = both(0)
    x, other = x.detach().sigmoid().requires_grad_(), other.sigmoid()
    rules = DEEPLIFT.with_operation(torch.erfinv, "activation")
    with propagate(rules) as report:
        y = torch.erfinv(x)
    with report.reference():
        after = torch.erfinv(other)
    torch.testing.assert_close((other - x) * torch.autograd.grad(y.sum(), x)[0], after - y)


@wrap_torch_function(lambda x: (x,))
def tenth(x: Tensor) -> Tensor:
    return x / 10


def test_what_rules_say_themselves_comes_before_what_is_registered() -> None:
    own = RELP.with_operation(torch.erfinv, "activation")
    with register(torch.erfinv, tenfold):
        assert torch.equal(erfinv(own)[0], RATIO) and erfinv(own)[1] == own.name
        assert torch.equal(erfinv(RELP)[0], torch.tensor([10.0, 10.0]))
    # the nearest class first, whoever speaks of it
    with register(Doubling, "linear"), propagate(own.with_operation(Doubling, tenfold)) as report:
        x = torch.tensor(POINT, requires_grad=True)
        y = Doubling()(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([10.0, 10.0]))
    assert " + " not in report.name


def test_results_are_labelled_with_the_registrations_that_they_used() -> None:
    with register(torch.erfinv, "activation"), register(torch.lgamma, "linear"):
        found, name = erfinv(RELP)
        assert torch.equal(found, RATIO) and name == "RELP + erfinv=activation"
        with propagate(RELP) as report:
            torch.lgamma(torch.erfinv(torch.tensor([0.1], requires_grad=True)))
        assert report.name == "RELP + erfinv=activation, lgamma=linear"
        assert erfinv(RELP.with_("mine"))[1] == "mine + erfinv=activation"
        # what carries no relevance, and what is inside a module of one operation, is not met
        with propagate(RELP) as report:
            torch.erfinv(torch.zeros(2))
            with report.paused():
                torch.erfinv(torch.zeros(2, requires_grad=True))
        assert report.name == "RELP"
    with register(Doubling, "linear"), propagate(RELP) as report:
        Doubling()(torch.ones(2))
        assert report.name == "RELP"
        Doubling()(torch.ones(2, requires_grad=True))
    assert report.name == f"RELP + {__name__}.Doubling=linear"
    with register(Doubling, tenfold), propagate(DEEPLIFT) as report, torch.no_grad():
        Doubling()(torch.ones(2, requires_grad=True))
    assert report.name.startswith(f"DEEPLIFT + {__name__}.Doubling=tenfold#")
    with register(nn.GELU, "exponent"), propagate(RELP) as report:
        nn.GELU()(torch.ones(2, requires_grad=True))
    assert report.name == "RELP + GELU=exponent"


FORMULAS: dict[str, Callable[[], Any]] = {
    "of one's own name": lambda: tenfold,
    "7": lambda: lambda g, x, y: 7 * g,
    "8": lambda: lambda g, x, y: 8 * g,
    "a sum": lambda: lambda g, x, y: 8 + g,
    "inside": lambda: lambda g, x, y: (lambda t: t.tanh())(g),
    "inside, another": lambda: lambda g, x, y: (lambda t: t.sin())(g),
    "closure 2": lambda: times(2),
    "closure 3": lambda: times(3),
    "closure of a tensor": lambda: times(torch.ones(2)),
    "closure of another": lambda: times(torch.tensor([1.0, 2.0])),
    "closure of a dictionary": lambda: times({"a": 1}),
    "partial 2": lambda: partial(by_keyword, k=2),
    "partial 3": lambda: partial(by_keyword, k=3),
    "default 2": lambda: lambda g, x, y, k=2: g * k,
    "default 3": lambda: lambda g, x, y, k=3: g * k,
    "object 2": lambda: Times(2),
    "object 3": lambda: Times(3),
    "method 2": lambda: Times(2).__call__,
    "method 3": lambda: Times(3).__call__,
    "global": lambda: by_global,
    "of torch": lambda: torch.addcmul,
}


def by_keyword(g: Tensor, x: Tensor, y: Tensor, *, k: int) -> Tensor:
    return g * k


def test_formulas_that_differ_have_labels_that_differ() -> None:
    labels = {name: label((torch.nn.GELU, make())) for name, make in FORMULAS.items()}
    assert len(set(labels.values())) == len(labels)
    # and one that is made again has the label that it had
    assert labels == {n: label((torch.nn.GELU, make())) for n, make in FORMULAS.items()}
    assert re.fullmatch(r"GELU=tenfold#[0-9a-f]{6}", labels["of one's own name"])
    assert re.fullmatch(r"GELU=formula#[0-9a-f]{6}", labels["7"])
    assert re.fullmatch(r"GELU=formula#[0-9a-f]{6}", labels["object 2"])


def test_the_label_of_a_formula_knows_what_it_refers_to(monkeypatch: pytest.MonkeyPatch) -> None:
    before = label(("f", by_global))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert label(("f", by_global)) != before
    recursive: list[Any] = []
    recursive.append(times(recursive))
    assert label(("f", recursive[0])) == label(("f", recursive[0]))
    own, other = object(), object()
    assert label(("f", times(own))) != label(("f", times(other)))


def test_a_formula_has_one_label_in_every_process() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_operations as t\n"
        "print([t.label(('f', t.FORMULAS[n]())) for n in t.FORMULAS])"
    )
    run = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONHASHSEED": "7"}
    made = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    here = [label(("f", FORMULAS[n]())) for n in FORMULAS]
    assert made.stdout == f"{here}\n" and "tenfold#" in made.stdout


def test_a_registration_undoes_itself_and_no_other() -> None:
    first, second, third = (register(torch.erfinv, r) for r in ("linear", "activation", "linear"))
    third.remove()
    third.remove()
    assert erfinv(RELP)[1] == "RELP + erfinv=activation"
    first.remove()
    assert erfinv(RELP)[1] == "RELP + erfinv=activation"
    second.remove()
    with pytest.raises(UnknownOperationError):
        erfinv(RELP)


class Undoing(nn.Module):
    """Takes the registration of itself back while it runs, as another thread might."""

    def forward(self, x: Tensor) -> Tensor:
        self.registration.remove()
        return x * 2


def test_a_registration_may_end_while_its_module_runs() -> None:
    module = Undoing()
    module.registration = register(Undoing, tenfold)
    x = torch.tensor(POINT, requires_grad=True)
    with propagate(RELP) as report:
        y = module(x).tanh()
    assert report.to_dataframe()["kind"].tolist() == ["activation", "registered"]
    assert "tenfold#" in report.name
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
