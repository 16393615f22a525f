"""A run that is cut at some sites, so that what one of them does to the next is seen alone.

Behind a cut the run goes on with a tensor of its own that holds the same numbers: a backward from
one cut ends at the cuts before it, and gives the direct effects between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from relp.bridge.capture import ROOT
from relp.bridge.run import answers_only, observe, precise_logits
from relp.bridge.sites import Edit, Sites, editing
from relp.propagation import Propagation
from relp.protocols import TaskLike
from relp.rulebook import Rules

__all__ = ["Cuts", "cut_run"]


@dataclass(frozen=True, eq=False)
class Cuts:
    """Both runs, the own one cut; to be differentiated while it is there."""

    own: Mapping[str, Tensor]
    """What sites hold, without a graph."""
    other: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    """What arrives at each site, with the graph from the cuts before it on."""
    leaves: Mapping[str, Tensor]
    """What the run goes on with behind each cut, the embedding's first."""
    metric: Float[Tensor, " pair"]
    other_metric: Float[Tensor, " pair"]
    rules: str
    remainder: Mapping[str, float]

    def pulled(
        self, outputs: Sequence[Tensor], above: Sequence[Tensor | None]
    ) -> dict[str, Float[Tensor, "pair pos d"]]:
        """The coefficient behind each cut of what `outputs` are worth: `above` times themselves.

        Sites that they do not hang on directly are left out.
        """
        grads = torch.autograd.grad(
            list(outputs), list(self.leaves.values()), list(above), retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
        found = zip(self.leaves, grads, strict=True)
        return {site: grad.detach() for site, grad in found if grad is not None}


@contextmanager
def cut_run(
    sites: Sites,
    task: TaskLike,
    rules: Rules,
    cuts: Sequence[str],
    reads: Sequence[str],
    *,
    own: str,
    strict: bool = True,
) -> Iterator[Cuts]:
    """Runs both sides of some pairs of one length.

    Args:
        cuts: sites that the own run is cut at, in the order in which it comes to them; also at the
            embedding.
        reads: sites that are seen, and not cut.
        own: the side that is differentiated, `clean` or `corrupt`.

    Raises:
        RuntimeError: a site was not passed.
    """
    other = "corrupt" if own == "clean" else "clean"
    leaves: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}

    def cut(name: str, value: Tensor) -> Tensor:
        before[name] = value
        leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    def see(name: str, value: Tensor) -> Tensor:
        before[name] = value.view_as(value)
        return before[name]

    names = tuple(dict.fromkeys([ROOT, *cuts]))
    seen = tuple(n for n in dict.fromkeys(reads) if n not in names)
    edits: dict[str, Edit] = {n: partial(cut, n) for n in names}
    edits |= {n: partial(see, n) for n in seen}
    report = Propagation(rules, root=sites.model, strict=strict)
    with torch.enable_grad(), report:
        # the same operations, in the same order, as `observe` does in the other run
        edits |= answers_only(sites, task)
        with precise_logits(sites), editing(sites, edits):
            logits = sites.model(getattr(task, own).to(sites.device))
        # as in captures: for rules of one run the metric is a plain function
        with nullcontext() if rules.needs_reference else report.paused():
            metric = task.metric(logits)
        report.must_have_seen(metric)
    with ExitStack() as stack:
        if rules.needs_reference:
            stack.enter_context(report.reference())
        others, other_metric = observe(sites, task, (*names, *seen), side=other)
    held = sites.gathered(before)
    remainder: dict[str, float] = {}
    yield Cuts(held, others, before, leaves, metric, other_metric, report.name, remainder)
    for row in report.remainder().itertuples():
        key = f"{row.module}: {row.operation}"
        remainder[key] = remainder.get(key, 0.0) + float(row.remainder)
