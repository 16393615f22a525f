"""Running the model: activations of both runs, and coefficients at the sites of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from relp.propagation import Propagation, propagate
from relp.rulebook import Rules
from relp.sites import Edit, Sites, editing, reading

__all__ = ["Capture", "capture", "observe"]

ROOT = "L0.resid"
"""Where relevance ends: token plus position embedding, as block 0 gets it."""


@dataclass(frozen=True, eq=False)
class Linearised:
    """One run that was differentiated: activations, and the coefficients there."""

    values: Mapping[str, Tensor]
    coefficients: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Capture:
    """One batch of pairs: what both runs did, and the coefficients of one of them."""

    own: Mapping[str, Tensor]
    """Activations of the run that was differentiated."""
    other: Mapping[str, Tensor]
    """Activations of the other run."""
    path: tuple[Linearised, ...]
    """Where the metric was linearised: the own run, or `steps` runs between the two."""
    own_metric: Float[Tensor, " pair"]
    other_metric: Float[Tensor, " pair"]

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """d metric / d activation under the rules at each site, mean over the path."""
        count = len(self.path)
        names = self.path[0].coefficients
        if count == 1:
            return dict(names)
        return {n: torch.stack([p.coefficients[n] for p in self.path]).mean(0) for n in names}

    def delta(self, site: str) -> Tensor:
        """What patching changes at a site: other run minus own run."""
        return self.other[site] - self.own[site]


def observe(
    sites: Sites, task: Any, names: tuple[str, ...], *, side: str
) -> tuple[dict[str, Tensor], Float[Tensor, " pair"]]:
    """Activations at the named sites and the metric of one side (`clean`, `corrupt`), no grad."""
    tokens = getattr(task, side).to(sites.device)
    edits = answers_only(sites, task)
    with torch.no_grad(), editing(sites, edits), reading(sites, names) as values:
        metric = task.metric(sites.model(tokens))
    return values, metric


def answers_only(sites: Sites, task: Any, copies: int = 1, start: int = 0) -> dict[str, Edit]:
    """The edit that hands the unembedding each row's answer position alone, `[row, 1, d_model]`.

    Empty if the metric may read other positions. `copies`: how often the batch repeats the pairs;
    `start`: the first position in the batch (a pair that ends before it gets that one).
    """
    if not task.metric.reads_answer_only:
        return {}
    end = (task.spans["end"] - start).clamp(min=0).to(sites.device).repeat(copies)
    return {"unembed": lambda x: x[torch.arange(len(x), device=x.device), end][:, None]}


def capture(
    sites: Sites, task: Any, rules: Rules, names: tuple[str, ...], *, own: str, steps: int = 1
) -> Capture:
    """Two forward passes and one backward (with `steps` > 1: `steps` passes along the path).

    With `steps=1` the coefficients are those of the `own` side (`clean` or `corrupt`). With more,
    they are averaged over runs whose input embeddings lie midway in each of `steps` equal parts
    of the line between the two runs (integrated gradients; EAP-IG, arXiv:2403.17806).

    Raises:
        RuntimeError: a site was not passed, or no relevance reaches one that must get some.
    """
    other = "corrupt" if own == "clean" else "clean"
    names = tuple(dict.fromkeys([ROOT, *names]))
    if steps == 1:
        with propagate(rules, root=sites.model) as report:
            values, metric = _differentiable(sites, task, names, own, rules, report)
        with ExitStack() as stack:
            if rules.needs_reference:
                stack.enter_context(report.reference())
            others, other_metric = observe(sites, task, names, side=other)
        path = [_linearised(metric, values, names, rules)]
    else:
        others, other_metric = observe(sites, task, names, side=other)
        values, metric = observe(sites, task, names, side=own)
        path = []
        for step in range(steps):
            at = (step + 0.5) / steps
            root = torch.lerp(values[ROOT], others[ROOT], at)
            with propagate(rules, root=sites.model) as report:
                between, middle = _differentiable(sites, task, names, own, rules, report, root)
            path.append(_linearised(middle, between, names, rules))
    own_values = {n: v.detach() for n, v in values.items()}
    return Capture(own_values, others, tuple(path), metric.detach(), other_metric.detach())


def _differentiable(
    sites: Sites,
    task: Any,
    names: tuple[str, ...],
    side: str,
    rules: Rules,
    report: Propagation,
    root: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The run that will be differentiated, from block 0's input on."""
    tokens = getattr(task, side).to(sites.device)

    def start(value: Tensor) -> Tensor:
        """Makes block 0's input the leaf of the graph, with the value `root` if one is given."""
        return (value if root is None else root).detach().requires_grad_()

    with torch.enable_grad():
        edits = {ROOT: start, **answers_only(sites, task)}
        # Where a parallel block's attention and MLP read one tensor, the MLP gets one of its own:
        # the coefficient there must be that of this reader alone.
        edits |= {n: _branch for n in names if n.endswith(".mlp_in")}
        with editing(sites, edits), reading(sites, names) as values:
            logits = sites.model(tokens)
            # Rules that compare two runs must see the metric to be exact through it. For the
            # others it is a plain function: a constant softmax would cut a probability metric off.
            metric = task.metric(logits) if rules.needs_reference else None
        if metric is None:
            with report.paused():
                metric = task.metric(logits)
    report.must_have_seen(metric)
    return values, metric


def _branch(value: Tensor) -> Tensor:
    return value.view_as(value)


def _linearised(
    metric: Tensor, values: Mapping[str, Tensor], names: tuple[str, ...], rules: Rules
) -> Linearised:
    if not metric.requires_grad:
        raise ValueError(
            "the metric must be differentiable in the logits; it does not depend on them, or not "
            "differentiably (argmax, detach); check the metric, and hooks that detach activations"
        )
    # pairs do not meet in the model: the gradient of the sum holds each pair's own gradient
    grads = torch.autograd.grad(metric.sum(), [values[n] for n in names], allow_unused=True)
    found = {}
    for name, grad in zip(names, grads, strict=True):
        if grad is None:
            # with constant attention patterns nothing reaches queries and keys: a true zero
            if rules.softmax == "constant" and name.endswith((".q", ".k")):
                grad = torch.zeros_like(values[name])
            else:
                raise RuntimeError(
                    f"every site must lie on the path from the input to the metric; {name!r} does "
                    "not; check that no hook detaches activations and that the metric uses logits"
                )
        found[name] = grad
    return Linearised({n: values[n].detach() for n in names}, found)
