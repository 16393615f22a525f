"""Propagation as a whole: exact values, nothing skipped in silence, nothing left behind."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import random_task
from replica import Replica
from torch import Tensor, nn

from relp import (
    ATTN_LRP,
    CP_LRP,
    DEEPLIFT,
    GIM,
    GRADIENT,
    RELP,
    Rules,
    UnknownOperationError,
    coverage,
    propagate,
)
from relp.attribution import node_sites
from relp.capture import capture
from relp.sites import Sites
from tasks import ioi

ALL = (GRADIENT, RELP, CP_LRP, ATTN_LRP, GIM, DEEPLIFT)
ONE_RUN = (GRADIENT, RELP, CP_LRP, ATTN_LRP, GIM)
names = {"argvalues": ALL, "ids": [r.name for r in ALL]}


@pytest.mark.parametrize("rules", **names)
def test_logits_are_bit_identical(shipped: Any, rules: Rules) -> None:
    tokens = ioi(shipped.tokenizer, pairs=4, seed=3).clean
    plain = shipped(tokens).detach()
    root: list[Tensor] = []

    def start(_: nn.Module, __: Any, value: Tensor) -> Tensor:
        root.append(value.detach().requires_grad_())
        return root[0]

    handle = shipped.blocks[0].hook_in.register_forward_hook(start)
    try:
        with propagate(rules):
            logits = shipped(tokens)
    finally:
        handle.remove()
    assert logits.requires_grad
    assert torch.equal(logits, plain)


@pytest.mark.parametrize("rules", ONE_RUN, ids=[r.name for r in ONE_RUN])
@pytest.mark.parametrize("own", ["clean", "corrupt"])
def test_coefficients_equal_a_second_implementation(shipped: Any, rules: Rules, own: str) -> None:
    task = ioi(shipped.tokenizer, pairs=2, seed=5)
    sites = Sites.of(shipped)
    found = capture(sites, task, rules, node_sites(sites), own=own).coefficients
    expected = Replica(shipped, rules).coefficients(task, own)
    for name in node_sites(sites):
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < 2e-5, name  # float32 against float64; measured: below 4e-6


@pytest.mark.parametrize("rules", ONE_RUN, ids=[r.name for r in ONE_RUN])
def test_coefficients_of_random_models_too(tiny: Any, rules: Rules) -> None:
    task = random_task(tiny, seed=1)
    sites = Sites.of(tiny)
    found = capture(sites, task, rules, node_sites(sites), own="corrupt").coefficients
    expected = Replica(tiny, rules).coefficients(task, "corrupt")
    for name in node_sites(sites):
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < 5e-6, name


def test_cp_lrp_conserves_relevance(tiny: Any) -> None:
    """Without biases (and here the tiny models have zero ones) Σ x·c is the output itself."""
    sites = Sites.of(tiny)
    task = random_task(tiny)
    seen = capture(sites, task, CP_LRP, node_sites(sites), own="clean")
    total = (seen.own["L0.resid"] * seen.coefficients["L0.resid"]).sum((1, 2))
    torch.testing.assert_close(total, seen.own_metric, rtol=1e-4, atol=1e-5)


def test_an_unknown_operation_is_an_error_that_names_it() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(x)

    model = nn.Sequential(nn.Linear(2, 2), Odd())
    x = torch.rand(3, 2, requires_grad=True)
    with pytest.raises(UnknownOperationError) as error, propagate(RELP, root=model):
        model(x)
    assert str(error.value) == (
        "every operation that carries relevance must have a rule; 'lgamma' in '1' has none; "
        "pass strict=False to let its derivative through and see it in the report"
    )
    with propagate(RELP, root=model, strict=False) as report:
        y = model(x)
    frame = report.to_dataframe()
    assert frame[frame.kind == "unknown"][["operation", "module", "count"]].values.tolist() == [
        ["lgamma", "1", 1]
    ]
    y.sum().backward()
    # and nothing of it concerns tensors that carry no relevance
    with propagate(RELP):
        torch.lgamma(torch.ones(2))


def test_modes_end_with_the_block_also_after_an_error() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), propagate(RELP):
        F.linear(x, torch.ones(2, 3))
    (plain,) = torch.autograd.grad(F.gelu(x), x)
    leaf = x.detach().clone().requires_grad_()
    torch.testing.assert_close(plain, torch.autograd.grad(F.gelu(leaf), leaf)[0])
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_rules_of_two_runs_need_both() -> None:
    x = torch.ones(2, requires_grad=True)
    with propagate(DEEPLIFT):
        y = F.gelu(x).sum()
    with pytest.raises(RuntimeError, match="operation 'gelu' has seen one run only; run the other"):
        torch.autograd.grad(y, x)


def test_a_reference_run_on_another_path_is_an_error() -> None:
    def path(t: Tensor, *, long: bool) -> Tensor:
        return F.gelu(F.silu(t)) if long else F.gelu(t)

    x = torch.ones(2, requires_grad=True)
    with propagate(DEEPLIFT) as report:
        path(x, long=True)
    with (
        pytest.raises(ValueError, match="where that did 'silu' it does 'gelu'"),
        report.reference(),
    ):
        path(x, long=False)
    with propagate(DEEPLIFT) as report:
        path(x, long=True)
    with pytest.raises(ValueError, match="1 were missing, the first a 'gelu'"), report.reference():
        F.silu(x)


@pytest.mark.parametrize("rules", [RELP, CP_LRP, ATTN_LRP, DEEPLIFT], ids=lambda r: r.name)
def test_in_place_rule_operations_are_refused(rules: Rules) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(UnknownOperationError, match="overwrites it in place"), propagate(rules):
        F.relu(x * 2, inplace=True)


def test_custom_autograd_functions_are_not_overlooked(tiny: Any) -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    point = tiny.blocks[1].mlp.hook_out
    handle = point.register_forward_hook(lambda _, __, value: Hidden.apply(value))
    try:
        sites = Sites.of(tiny)
        capture(sites, random_task(tiny), GRADIENT, (), own="clean")
        with pytest.raises(UnknownOperationError, match="'Hidden' hides its operations"):
            capture(sites, random_task(tiny), RELP, (), own="clean")
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["topk", "max", "amax", "sort"])
def test_selections_must_agree_between_two_runs(name: str) -> None:
    def choose(t: Tensor) -> Tensor:
        if name == "topk":
            return t.topk(2).values
        if name == "sort":
            return t.sort().values
        return t.max(-1).values if name == "max" else t.amax(-1)

    x = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    for other, same in (
        (torch.tensor([0.0, 9.0, 1.0]), True),
        (torch.tensor([9.0, 0.0, 1.0]), False),
    ):
        with propagate(DEEPLIFT) as report:
            y = choose(x).sum()
        if same:
            with report.reference():
                after = choose(other).sum()
            (c,) = torch.autograd.grad(y, x)
            torch.testing.assert_close(((other - x) * c).sum(), after - y)
        else:
            with pytest.raises(ValueError, match="chooses differently"), report.reference():
                choose(other)


@pytest.mark.parametrize("product", [Tensor.mul_], ids=["mul_"])
def test_in_place_products_are_refused(product: Any) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(UnknownOperationError, match="overwrites it in place"), propagate(RELP):
        product(x * 2, x + 1)


@pytest.mark.parametrize("run", ["own", "reference"])
def test_tensors_overwritten_after_a_rule_are_an_error(run: str) -> None:
    """torch guards what its own derivatives need; so must we."""

    def model(t: Tensor, *, spoil: bool) -> Tensor:
        hidden = t * 2
        out = F.gelu(hidden)
        if spoil:
            hidden.add_(1)
        return out

    x = torch.ones(2, requires_grad=True)
    with propagate(DEEPLIFT) as report:
        y = model(x, spoil=run == "own")
    with report.reference():
        model(torch.zeros(2), spoil=run == "reference")
    with pytest.raises(RuntimeError, match="modified by an inplace|were overwritten in place"):
        torch.autograd.grad(y.sum(), x)


def test_operands_by_keyword_get_the_same_rule() -> None:
    x = torch.tensor([[0.5, -1.0]], requires_grad=True)
    pairs: list[tuple[Any, Any]] = [
        (lambda t: F.gelu(input=t), F.gelu),
        (lambda t: torch.softmax(input=t, dim=-1), lambda t: t.softmax(-1)),
        (lambda t: torch.mul(input=t, other=t + 1), lambda t: t * (t + 1)),
        (lambda t: torch.einsum("ij,ij->ij", [t, t]), lambda t: torch.einsum("ij,ij->ij", t, t)),
    ]  # fmt: skip
    for one, two in pairs:
        for rules in (RELP, ATTN_LRP, GIM):
            with propagate(rules):
                a, b = one(x), two(x)
            g = torch.tensor([[1.0, 3.0]])
            assert torch.equal(torch.autograd.grad(a, x, g)[0], torch.autograd.grad(b, x, g)[0])
    # where that cannot be told apart it is refused
    with pytest.raises(UnknownOperationError, match="given by position"), propagate(ATTN_LRP):
        F.linear(x, weight=x + 1)


def test_weights_computed_from_parameters_need_a_root() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + self.weight)

    model, x = Offset(), torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="give the module as propagate"), propagate(RELP):
        model(x)
    with propagate(RELP, root=model):
        y = model(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([2.0, 3.0]))
    assert model.weight.requires_grad


@pytest.mark.parametrize(
    "function",
    [lambda t: torch.clamp(t, min=2 * t), lambda t: t**t, lambda t: torch.pow(2.0, t)],
    ids=["clamp", "power", "exponential"],
)
def test_functions_of_several_dependent_operands_are_refused(function: Any) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with propagate(GRADIENT):
        function(x)
    with pytest.raises(UnknownOperationError, match="does by several"), propagate(RELP):
        function(x)


def test_rules_change_coefficients(tiny: Any) -> None:
    sites = Sites.of(tiny)
    task = random_task(tiny)
    found = [capture(sites, task, r, (), own="clean").coefficients["L0.resid"] for r in ALL]
    for i, one in enumerate(found):
        for two in found[:i]:
            assert (one - two).norm() > 1e-2 * one.norm()


def test_coverage_of_a_model(tiny: Any) -> None:
    frame = coverage(tiny, torch.tensor([[1, 2, 3]]), rules=CP_LRP)
    counts = frame.groupby("kind")["count"].sum().to_dict()
    layers, gated = len(tiny.blocks), tiny.cfg.gated_mlp
    assert "unknown" not in counts
    assert counts["softmax"] == layers
    assert counts["activation"] == layers
    # each norm squares its input; a gated MLP multiplies once
    assert counts["gate"] == 2 * layers + 1 + (layers if gated else 0)
    assert set(frame.query("kind == 'softmax'")["rule"]) == {"constant"}
    assert {"blocks", "L0"}.isdisjoint(frame["module"])
    with pytest.raises(ValueError, match="none of its operations depended on the inputs"):
        coverage(nn.Identity(), 3)


def test_wrong_rules_are_refused() -> None:
    # the type checker of the tests would refuse it first
    with pytest.raises(TypeError, match=r"turn a name into rules with relp\.preset"):
        inspect.unwrap(propagate)("RELP")  # type: ignore[arg-type]
