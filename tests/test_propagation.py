"""Propagation as a whole: exact values, nothing skipped in silence, nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import inspect
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from relp.bridge.captures import capture
from relp.bridge.sites import Sites
from relp.nodes import node_sites
from relp.propagation import frames, witness
from relp.rules import Reference
from tasks import ioi


class Function(nn.Module):
    """Any function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(x)
        return out


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


@pytest.mark.parametrize(
    ("rules", "own"),
    [*((rules, "corrupt") for rules in ONE_RUN), (RELP, "clean")],
    ids=lambda value: getattr(value, "name", value),
)
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
        "give it one with relp.register, or pass strict=False to let its derivative through and "
        "see it in the report"
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
        pytest.raises(ValueError, match="it does another 'tanh' in ''"),
        report.reference(),
    ):
        path(x, long=True).tanh()
    with propagate(DEEPLIFT) as report:
        path(x, long=True)
    with pytest.raises(ValueError, match="1 were missing, the first a 'gelu'"), report.reference():
        F.silu(x)


IN_PLACE: dict[str, tuple[Any, Any]] = {
    "relu": (lambda t: F.relu(t, inplace=True), F.relu),
    "relu by position": (lambda t: F.relu(t, True), F.relu),
    "elu by position": (lambda t: F.elu(t, 1.5, True), lambda t: F.elu(t, 1.5)),
    "module": (nn.SiLU(inplace=True), F.silu),
    "mul_": (lambda t: t.mul_(t + 1), lambda t: t * (t + 1)),
    "of torch.ops": (lambda t: torch.ops.aten.mul_.Tensor(t, t + 1), lambda t: t * (t + 1)),
    "*=": (lambda t: t.__imul__(t + 1), lambda t: t * (t + 1)),
    "div_": (lambda t: t.div_(t.sum(-1, keepdim=True)), lambda t: t / t.sum(-1, keepdim=True)),
    "of a view": (lambda t: (t[:, :1].sigmoid_(), t)[1], lambda t: torch.cat(
        [t[:, :1].sigmoid(), t[:, 1:]], 1)),
}  # fmt: skip


@pytest.mark.parametrize("rules", **names)
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operations_get_the_rule_of_the_plain_ones(rules: Rules, name: str) -> None:
    g = torch.tensor([[1.0, -2.0, 3.0]])

    def run(function: Any) -> tuple[Tensor, Tensor]:
        x = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True)
        with propagate(rules) as report:
            hidden = x * 2
            y = function(hidden)
        if rules.needs_reference:
            with report.reference():
                function(torch.tensor([[1.5, 1.0, -0.5]]) * 2)
        return y.detach(), torch.autograd.grad(y, x, g)[0]

    in_place, plain = IN_PLACE[name]
    for one, two in zip(run(in_place), run(plain), strict=True):
        assert torch.equal(one, two)


def recurrence(x: Tensor, write: Any) -> Tensor:
    """h_t = tanh(0.9 h_{t-1} + x_t), written into one buffer step by step."""
    y, h = torch.zeros_like(x), x[:, 0]
    before = y[:, 1:].transpose(0, 1)
    for t in range(x.shape[1]):
        h = (0.9 * h + x[:, t]).tanh()
        write(y, t, h, before)
    return y


def assign(y: Tensor, t: int, h: Tensor, _: Tensor) -> None:
    y[:, t] = h


def add(y: Tensor, t: int, h: Tensor, _: Tensor) -> None:
    y[:, t] += h


def by_the_view(y: Tensor, t: int, h: Tensor, view: Tensor) -> None:
    """Into one that was there before the first write, but for the first."""
    (view[t - 1] if t else y[:, 0]).copy_(h)


LOOPS: dict[str, Any] = {
    "copied": lambda y, t, h, _: y[:, t].copy_(h),
    "assigned": assign,
    "added": add,
    "by index": lambda y, t, h, _: y.index_copy_(1, torch.tensor([t]), h[:, None]),
    "through views of views": lambda y, t, h, _: y[:, t:].select(1, 0)[:, 0:].add_(h),
    "by a view from before": by_the_view,
}


@pytest.mark.parametrize("rules", **names)
@pytest.mark.parametrize("name", LOOPS)
def test_results_written_one_by_one_are_those_of_a_stack(rules: Rules, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other, g = torch.randn(3, 2, 5, 3, generator=generator, dtype=torch.float64)

    def stacked(x: Tensor) -> Tensor:
        rows: list[Tensor] = []
        recurrence(x, lambda y, t, h, _: rows.append(h))
        return torch.stack(rows, 1)

    def run(function: Any) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        with propagate(rules) as report:
            y = function(leaf)
            report.must_have_seen(y)
            y = y.sigmoid()
        if rules.needs_reference:
            with report.reference():
                function(other).sigmoid()
        return y.detach(), torch.autograd.grad(y, leaf, g)[0]

    one, two = run(lambda t: recurrence(t, LOOPS[name])), run(stacked)
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(one[1], two[1])


@pytest.mark.parametrize("name", LOOPS)
def test_a_long_loop_of_writes_is_looked_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node counts: how many are visited grows with the steps, not with their square."""
    numbers = witness.nodes_so_far
    visited = 0

    def count() -> int:
        nonlocal visited
        visited += 1
        return numbers()

    monkeypatch.setattr(witness, "nodes_so_far", count)
    counts = []
    for steps in (25, 50, 100):
        visited = 0
        x = torch.ones(1, steps, 2, requires_grad=True)
        with propagate(RELP):
            y = recurrence(x, LOOPS[name]).tanh()
        counts.append(visited)
    assert counts[2] - counts[1] <= 2 * (counts[1] - counts[0])
    assert counts[2] <= 2 * 100
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_a_long_chain_of_views_is_no_recursion() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    with propagate(RELP) as report:
        y = x * 2
        with torch._C.DisableTorchFunction():  # as if torch had made them anew
            view = y
            for _ in range(3000):
                view = view.view(2, 3)
        z = view.tanh()
        assert len(report._witness.explained) > 3000
        visited = len(report._witness.explained)
        view.tanh()
        assert len(report._witness.explained) == visited + 1
    torch.autograd.grad(z.sum(), x)


def test_in_place_operations_still_overwrite() -> None:
    x = torch.tensor([0.5, -1.0], requires_grad=True)
    with propagate(RELP):
        hidden = x * 2
        y = hidden.relu_()
    assert hidden is y
    assert torch.equal(hidden, torch.tensor([1.0, 0.0]))


def test_in_place_operations_of_no_rule_are_refused_where_they_meet_what_is_detached() -> None:
    x = torch.ones(2, requires_grad=True)
    with propagate(DEEPLIFT, strict=False) as report:
        (x * 2).atan2_(x.detach())
    found = report.to_dataframe()[["operation", "kind"]].values.tolist()
    assert ["atan2", "unknown"] in found and ["atan2", "linear"] not in found
    with pytest.raises(UnknownOperationError, match="'atan2'"), propagate(DEEPLIFT):
        (x * 2).atan2_(x.detach())


def test_attributes_that_are_set_are_no_operations() -> None:
    x = torch.ones(2, requires_grad=True)
    with propagate(RELP) as report:
        h = x * 2
        h.grad = None
        cut = h.detach()
        cut.requires_grad = True
        cut.tanh()
    assert report.to_dataframe()["operation"].tolist() == ["tanh", "mul"]


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
        with pytest.raises(
            UnknownOperationError, match="'Hidden' before or in .* hides its operations"
        ):
            capture(sites, random_task(tiny), RELP, (), own="clean")
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "choose",
    [
        lambda t: t.max(-1).values,
        lambda t: t.amax(-1),
        lambda t: t.max(),
        lambda t: t.amin((0, 1)),
        lambda t: torch.maximum(t, t.flip(-1)),
        lambda t: torch.max(t, t.roll(1, -1)),
        lambda t: F.max_pool1d(t, 2),
        lambda t: F.max_pool2d(t[None], 2, return_indices=True)[0],
        lambda t: F.adaptive_max_pool1d(t, 2),
    ],
    ids=[
        "max",
        "amax",
        "max of all",
        "amin",
        "maximum",
        "max of two",
        "pool",
        "pool2d",
        "adaptive",
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_extremes_of_two_runs_are_explained_whichever_wins(choose: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    chosen = Function(choose)  # (indices that differ need a module around them)
    with propagate(DEEPLIFT) as report:
        y = chosen(x)
    with report.reference():
        after = chosen(other)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (c,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(((other - x) * c).sum(), ((after - y) * g).sum())
    assert report.remainder().empty
    # the winner takes all where only one run is looked at
    with propagate(RELP):
        y = choose(x)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, g)[0], torch.autograd.grad(choose(x), x, g)[0]
    )


class Routed(nn.Module):
    """A router in miniature: which of two experts sees a token, by a choice of several kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.router = nn.Linear(3, 2, bias=False)
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.router(x).softmax(-1)
        if self.kind == "topk":
            weight, chosen = probabilities.topk(1)
        elif self.kind == "sort":
            weight, chosen = (t[:, :1] for t in probabilities.sort(descending=True))
        elif self.kind == "max":
            weight, chosen = probabilities.max(-1, keepdim=True)
        elif self.kind == "kthvalue":
            weight, chosen = probabilities.kthvalue(2, -1, keepdim=True)
        elif self.kind == "median":
            weight, chosen = (t[:, None] for t in probabilities.median(-1))
        elif self.kind == "argmax":
            chosen = probabilities.argmax(-1, keepdim=True)
            weight = probabilities.gather(-1, chosen)
        elif self.kind == "where":
            chosen = torch.where(probabilities[:, :1] > 0.5, 0, 1)
            weight = probabilities.gather(-1, chosen)
        else:
            with torch.no_grad():
                chosen = (probabilities * 1.5).topk(1).indices
            weight = probabilities.gather(-1, chosen)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen[:, 0] == index)
            out[rows] = expert(x[rows]) * weight[rows]
        return out


@pytest.mark.parametrize(
    "kind", ["topk", "sort", "max", "kthvalue", "median", "argmax", "where", "no_grad"]
)
def test_what_branches_leave_unexplained_is_reported(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Routed(kind), nn.Tanh(), Routed(kind)).double().eval()
    clean, corrupt = torch.randn(2, 5, 3, dtype=torch.float64)
    clean.requires_grad_()
    with propagate(DEEPLIFT, root=model) as report:
        y = model(clean)
    with report.reference():
        after = model(corrupt)
    assert torch.equal(after, model(corrupt))  # its own branch, in the end
    g = torch.randn(5, 3, dtype=torch.float64)
    (c,) = torch.autograd.grad(y, clean, g)
    frame = report.remainder()
    assert set(frame["module"]) == {"1", "3"}
    assert frame["remainder"].abs().min() > 1e-3
    explained = ((corrupt - clean) * c).sum().item()
    gap = ((after - y) * g).sum().item()
    assert explained + frame["remainder"].sum() == pytest.approx(gap, rel=1e-9)
    # the last module's share is what its own jump adds, the experts' outputs being all that jumps
    operation = {"where": "gt", "no_grad": "topk"}.get(kind, kind)
    assert all(operation in found for found in frame["operation"])


def test_what_is_detached_leaves_a_remainder_where_it_is_used() -> None:
    """y = tanh(x)·detach(f(x)) + x - detach(max x), compared term by term."""

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.exp().sum(-1, keepdim=True) * 2
        assert bool(x.detach().isfinite().all())
        return x.tanh() * scale + (x - x.amax(-1, keepdim=True).detach())

    x, other = torch.randn(2, 5, 3, dtype=torch.float64)
    x.requires_grad_()
    with propagate(DEEPLIFT) as report:
        y = function(x)
    with report.reference():
        after = function(other)
    assert torch.equal(after, function(other))
    (c,) = torch.autograd.grad(y.sum(), x)
    frame = report.remainder().set_index("operation")["remainder"]
    scale, scale_ = (t.detach().exp().sum(-1, keepdim=True) * 2 for t in (x, other))
    assert frame["mul"] == pytest.approx(float((other.tanh() * (scale_ - scale)).sum()))
    top, top_ = (t.detach().amax(-1).sum() for t in (x, other))
    assert frame["sub"] == pytest.approx(float(-3 * (top_ - top)))
    explained = ((other - x) * c).sum().item()
    assert explained + frame.sum() == pytest.approx((after - y).sum().item(), rel=1e-9)


def test_same_branches_leave_nothing_unexplained() -> None:
    torch.manual_seed(0)
    model = Routed("topk").double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    other = x.detach() * 1.01
    with propagate(DEEPLIFT, root=model) as report:
        y = model(x)
    with report.reference():
        after = model(other)
    (c,) = torch.autograd.grad(y.sum(), x)
    assert report.remainder().empty
    torch.testing.assert_close(((other - x) * c).sum().detach(), (after - y).sum().detach())


def test_a_branch_outside_of_any_module_is_an_error() -> None:
    x = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    with propagate(DEEPLIFT) as report:
        x.topk(2).values.sum()
    with (
        pytest.raises(ValueError, match="'topk' chooses differently, and no module"),
        report.reference(),
    ):
        torch.tensor([9.0, 0.0, 1.0]).topk(2)


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
        (lambda t: F.linear(t, weight=t + 1), lambda t: F.linear(t, t + 1)),
        (lambda t: torch.einsum("ij,ij->ij", [t, t]), lambda t: torch.einsum("ij,ij->ij", t, t)),
    ]  # fmt: skip
    for one, two in pairs:
        for rules in (RELP, ATTN_LRP, GIM):
            with propagate(rules):
                a, b = one(x), two(x)
            g = torch.tensor([[1.0, 3.0]])[:, : a.shape[1]]
            assert torch.equal(torch.autograd.grad(a, x, g)[0], torch.autograd.grad(b, x, g)[0])


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


def test_nothing_of_two_runs_outlives_their_graph() -> None:
    """Not even until the garbage collector comes: activations of both runs are large."""
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), Function(attend), nn.LayerNorm(4))
    x = torch.randn(2, 3, 4, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with propagate(DEEPLIFT, root=model) as report:
            y = model(x)
        with report.reference():
            model(torch.randn(2, 3, 4))
        kept = [weakref.ref(slot) for slot in gc.get_objects() if type(slot) is Reference]
        assert kept
        torch.autograd.grad(y.sum(), x)
        del y
        assert not [slot for slot in kept if slot() is not None]
        assert report.remainder().empty
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="a reference run can be made once"), report.reference():
        pass


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


LOST: dict[str, tuple[Any, str]] = {
    "added in place": (lambda x: ((x * 2).add_(x.detach()), "")[0].tanh(), "add"),
    "multiplied in place": (lambda x: (x * 2).mul_(x.detach()), "mul"),
    "in attention": (lambda x: F.scaled_dot_product_attention(x, x, x.detach()), ""),
    "in a composite": (lambda x: torch.addcmul(x, x.detach(), x), ""),
    "put into a buffer": (lambda x: x * put(torch.zeros_like(x), x.detach()), "mul"),
    "copied through a view": (lambda x: x * copied(torch.zeros_like(x), x.detach()), "mul"),
    "through an activation module": (lambda x: x * nn.Sigmoid()(x.detach()), "mul"),
    "in a slice": (lambda x: x[: int(x.detach()[:, 0].argmax()) + 1].tanh().sum(), ""),
}


def put(buffer: Tensor, value: Tensor) -> Tensor:
    buffer[0] = value[0]
    return buffer


def copied(buffer: Tensor, value: Tensor) -> Tensor:
    buffer[0].copy_(value[0])
    return buffer


@pytest.mark.parametrize("name", LOST)
def test_detached_values_are_followed_wherever_they_go(name: str) -> None:
    function = Function(LOST[name][0])
    generator = torch.Generator().manual_seed(4)
    x, other = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    with propagate(DEEPLIFT) as report:
        y = function(x)
    with report.reference():
        after = function(other)
    assert torch.equal(after, function(other))
    (c,) = torch.autograd.grad(y.sum(), x)
    rest = report.remainder()["remainder"].sum()
    explained = ((other - x) * c).sum().item()
    assert explained + rest == pytest.approx((after - y).sum().item(), rel=1e-9)


def test_an_activation_that_was_cut_is_a_leaf() -> None:
    x, other = torch.randn(2, 3, 4, dtype=torch.float64)
    cut: list[Tensor] = []

    def function(t: Tensor) -> Tensor:
        h = t.tanh().detach()
        if t.requires_grad:
            cut.append(h.requires_grad_())
        return h.exp() * 2

    with propagate(DEEPLIFT) as report:
        y = function(x.requires_grad_())
    with report.reference():
        after = function(other)
    (c,) = torch.autograd.grad(y.sum(), cut)
    total = ((other.tanh() - cut[0]) * c).sum()
    torch.testing.assert_close(total, (after - y).sum())


def in_no_grad(x: Tensor) -> Tensor:
    h = x * 2
    with torch.no_grad():
        h.add_(x.tanh())
    return h


def by_data(x: Tensor) -> Tensor:
    h = x * 2
    h.data.add_(x.data)
    return h


@pytest.mark.parametrize("function", [in_no_grad, by_data, lambda x: x * float(x.sum().numpy())])
def test_what_cannot_be_followed_is_refused(function: Any) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(UnknownOperationError), propagate(DEEPLIFT):
        function(x) if function in (in_no_grad, by_data) else x.detach().numpy()


class Caching(Routed):
    """Keeps what it has seen."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return super().forward(x)


class Overwriting(Routed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (Caching, {"cache": object()}, "also gets an object that may keep state"),
        (Overwriting, {}, "must leave its inputs as they are"),
    ],
)
def test_modules_that_cannot_run_twice_are_refused(kind: Any, kwargs: Any, message: str) -> None:
    torch.manual_seed(0)
    model = kind("topk")
    outer = Function(lambda x: model(x=x * 1, **kwargs) if not kwargs else model(x * 1, **kwargs))
    outer.inner = model
    x, other = torch.randn(2, 20, 3)
    with propagate(DEEPLIFT, root=outer) as report:
        outer(x.requires_grad_())
    with pytest.raises(ValueError, match=message), report.reference():
        outer(other)


def test_a_caught_exception_leaves_no_trace() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(TypeError):
                self.fails("no tensor")
            return F.gelu(x)

    x = torch.tensor([2.0], requires_grad=True)
    model = Tries()
    with propagate(RELP, root=model) as report:
        y = model(x)
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], (y / x).detach())
    assert report.to_dataframe()[["operation", "module"]].values.tolist() == [["gelu", "Tries"]]


def test_a_pre_hook_on_an_activation_is_refused() -> None:
    module = nn.GELU()
    module.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(UnknownOperationError, match="a pre-hook of GELU"), propagate(RELP):
        module(torch.ones(2, requires_grad=True))


def test_a_reference_run_of_another_shape_is_refused() -> None:
    x = torch.ones(1, 3, requires_grad=True)
    with propagate(DEEPLIFT) as report:
        F.gelu(x)
    with pytest.raises(ValueError, match="must have the shapes of the first"), report.reference():
        F.gelu(torch.ones(2, 3))


def test_functions_with_a_parameter_for_each_entry() -> None:
    low = torch.tensor([0.5, 0.0])
    x = torch.tensor([2.0, 2.0], requires_grad=True)
    with propagate(RELP):
        y = x.clamp(min=low)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.tensor([0.75, 1.0]))
    prelu, x = nn.PReLU(2), torch.tensor([[-2.0, -2.0]], requires_grad=True)
    with propagate(RELP, root=prelu):
        y = prelu(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.tensor([[0.25, 0.25]]))


# -- other threads ---------------------------------------------------------------------------------


def elsewhere(function: Callable[[], Any]) -> Any:
    """What a function gives in a thread of its own, its error if it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def test_another_thread_is_left_alone() -> None:
    mine, theirs = (
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), Function(torch.lgamma)),
    )
    x = torch.full((2, 4), 0.5)

    def run() -> tuple[Tensor, Tensor, bool]:
        leaf = x.clone().requires_grad_()
        y = theirs(leaf)
        with contextlib.suppress(TypeError):  # a module may raise, too
            theirs[1]("no tensor")
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0], theirs[0].weight.requires_grad

    expected = run()
    with propagate(RELP, root=mine) as report:
        y = mine(x.clone().requires_grad_())
        found = elsewhere(run)
        nn.GELU()(y)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    assert report.to_dataframe()[["operation", "module"]].values.tolist() == [
        ["GELU", "GELU"], ["linear", "Linear"]
    ]  # fmt: skip


def test_two_threads_propagate_at_the_same_time() -> None:
    """Through one model: its weights stay frozen until the last is done."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), Offset(), nn.LayerNorm(4))
    x = torch.randn(2, 4)
    meet = threading.Barrier(2, timeout=60)

    def alone(rules: Rules) -> tuple[Tensor, Any]:
        leaf = x.clone().requires_grad_()
        with propagate(rules, root=model) as report:
            y = model(leaf)
        return torch.autograd.grad(y.sum(0)[0], leaf)[0], report.to_dataframe()

    def together(rules: Rules) -> tuple[Tensor, Any]:
        leaf = x.clone().requires_grad_()
        first = rules is RELP
        if not first:
            meet.wait()  # the first is inside
        with propagate(rules, root=model) as report:
            if first:
                meet.wait()
            meet.wait()  # both are inside
            if not first:
                meet.wait()  # the first has left
            y = model(leaf)
        if first:
            meet.wait()
        return torch.autograd.grad(y.sum(0)[0], leaf)[0], report.to_dataframe()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(together, (RELP, GRADIENT), timeout=60))
    for (c, frame), (expected, own) in zip(found, map(alone, (RELP, GRADIENT)), strict=True):
        assert torch.equal(c, expected)
        assert frame.equals(own)
    assert all(p.requires_grad for p in model.parameters())
    assert not frames.FROZEN
    assert not torch.nn.modules.module._global_forward_hooks


class Offset(nn.Module):
    """Computes a weight from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)


@pytest.mark.parametrize("long", [False, True], ids=["lower numbers", "higher numbers"])
def test_what_a_model_leaves_to_another_thread_is_opaque(long: bool) -> None:
    def function(x: Tensor) -> Tensor:
        def work() -> Tensor:
            for _ in range(5000 if long else 0):  # each thread counts for itself
                x.exp()
            return x.exp()

        return elsewhere(work).tanh()

    x = torch.ones(2, requires_grad=True)
    for _ in range(100):
        x.exp()
    with propagate(GRADIENT):
        function(x * 2)
    with (
        pytest.raises(UnknownOperationError, match="'ExpBackward0' before or in .* hides its"),
        propagate(RELP),
    ):
        function(x * 2)


def test_what_another_thread_made_before_needs_no_rule() -> None:
    x = torch.ones(2, requires_grad=True)
    h = x * 2
    for _ in range(100):
        h = h.exp().log()

    def run() -> Tensor:
        with propagate(RELP):
            y = h.tanh() * 2
        return torch.autograd.grad(y.sum(), h, retain_graph=True)[0]

    torch.testing.assert_close(elsewhere(run), 2 * h.detach().tanh() / h.detach())


def test_coverage_gives_relevance_to_its_own_embeddings_only() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            assert not elsewhere(lambda: self.embedding(tokens)).requires_grad
            return self.embedding(tokens).tanh()

    model = Asks()
    assert coverage(model, torch.tensor([1, 2]))["operation"].tolist() == ["tanh"]
