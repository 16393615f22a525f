"""A run that is cut at some sites, so that what one of them does to the next is seen alone.

Behind a cut the run goes on with a tensor of its own that holds the same numbers: a backward from
one cut ends at the cuts before it, and gives the direct effects between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from relp.bridge.capture import ROOT, Cuts
from relp.bridge.run import answers_only, observe, precise_logits
from relp.bridge.sites import Edit, Sites, editing
from relp.propagation import Propagation
from relp.protocols import TaskLike
from relp.rulebook import Rules

__all__ = ["cut_run"]


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
