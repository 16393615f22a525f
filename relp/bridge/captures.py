"""Captures: activations of both runs, and coefficients at the sites of one of them.

The graph of the run that is differentiated is the largest thing that `attribute` holds. Where that
of a whole run does not fit, it is made block by block: the blocks hand the residual stream on, so
that the coefficient of what some blocks hand on is all that the blocks before them need. That takes
one more forward pass of each run that is differentiated or compared with, and gives the same
numbers. What is captured is then kept in the memory of the machine, not of the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from relp.bridge.capture import ROOT, Capture
from relp.bridge.live import Live
from relp.bridge.memory import Need
from relp.bridge.run import (
    answers_only,
    entries,
    observe,
    output_shapes,
    precise_logits,
    skipping,
)
from relp.bridge.sites import Edit, Sites, editing, reading
from relp.propagation import Propagation, must_have_attached
from relp.protocols import TaskLike
from relp.rulebook import Rules

__all__ = ["capture", "captures", "needed"]

Values = Mapping[str, Tensor]
NOTHING: Values = MappingProxyType({})


def capture(
    sites: Sites,
    task: TaskLike,
    rules: Rules,
    names: tuple[str, ...],
    *,
    own: str,
    coefficients: tuple[str, ...] | None = None,
    blocks: int | None = None,
    strict: bool = True,
) -> Capture:
    """Two forward passes and one backward: the coefficients of the `own` side.

    For rules that are partway, two backward passes.

    Args:
        names: sites whose activations are kept.
        coefficients: sites of which coefficients are; the same if None.
        blocks: how many blocks are differentiated at a time, all if None. If not all, each of both
            runs may take one more forward pass.

    Raises:
        RuntimeError: a site was not passed, or no relevance reaches one that must get some.
    """
    (seen,) = captures(
        sites, task, rules, names, own=own, steps=1, coefficients=coefficients, blocks=blocks,
        strict=strict,
    )  # fmt: skip
    return seen


def captures(
    sites: Sites,
    task: TaskLike,
    rules: Rules,
    names: tuple[str, ...],
    *,
    own: str,
    steps: int,
    path: str = "inputs",
    coefficients: tuple[str, ...] | None = None,
    blocks: int | None = None,
    strict: bool = True,
) -> Iterator[Capture]:
    """Captures whose scores are to be averaged: one on the own side, or along a path.

    With `steps` > 1 the runs lie midway in each of `steps` equal parts of the line between own
    and other run (integrated gradients). `path="inputs"`: of the input embeddings (EAP-IG inputs,
    arXiv:2403.17806). `path="activations"`: of one writing site at a time, what comes before it
    being the own run's (EAP-IG activations, ibid.; a layer's heads move together, and so do its
    neurons where they are among `names`). `path="site"`: of each site with coefficients by itself,
    which alone gets them then (integrated gradients of a site, as in arXiv:2403.19647).

    Other arguments and errors: as `capture`.
    """
    way = _Way.of(sites, task, rules, names, coefficients, own, blocks, strict)
    if steps == 1:
        found = way.differentiated()
        yield Capture(
            found.values, found.others, found.values, found.others, found.coefficients,
            found.metric, found.other_metric, remainder=found.remainder, rules=found.rules,
            slopes=found.slopes,
        )  # fmt: skip
        return
    # an MLP's output that is put in would cut its neurons off from the metric
    inside = {b.name("mlp"): b.name("neurons") for b in sites.blocks if b.name("neurons") in names}
    written = [inside.get(site, site) for site in sites.written]
    asked = names if coefficients is None else coefficients
    moved = {"inputs": (ROOT,), "activations": (ROOT, *written), "site": asked}[path]
    kept = tuple(dict.fromkeys((*way.names, *moved)))
    values, metric = observe(sites, task, kept, side=own)
    others, other_metric = observe(sites, task, kept, side=way.other)
    for site in moved:
        for step in range(steps):
            between = torch.lerp(values[site], others[site], (step + 0.5) / steps)
            found = way.differentiated({site: between}, cut=path != "inputs")
            at, share = found.coefficients, 1 / (steps * len(moved))
            if path == "site":
                share = 1 / steps
                at = {n: c if n == site else torch.zeros_like(c) for n, c in at.items()}
            yield Capture(
                values, others, found.values, others, at, metric, other_metric, share,
                rules=found.rules,
            )  # fmt: skip
            del found  # or the next run would have this one beside it


def needed(
    sites: Sites,
    task: TaskLike,
    *,
    rules: Rules,
    names: tuple[str, ...],
    coefficients: tuple[str, ...],
    own: str,
) -> Need:
    """What capturing the first pair would take, found by running single blocks of the model.

    One of each kind of block, on the embedding in the place of the stream: what is alive then does
    not depend on the numbers, and they may be missing (`meta` tensors).
    """
    way = _Way.of(sites, task.select([0]), rules, names, coefficients, own, 1, strict=False)
    with Live((*sites.model.parameters(), *sites.model.buffers())) as live:
        return way.needed(live)


@dataclass(eq=False)
class _Found:
    """What is known of a run that is differentiated, and of the one that it is compared with."""

    values: Values
    metric: Tensor
    others: Values = field(default_factory=lambda: NOTHING)
    other_metric: Tensor = field(default_factory=lambda: torch.empty(0))
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    remainder: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rules: str = ""

    def note(self, report: Propagation) -> None:
        """Keeps what the report of (a part of) the run says."""
        for row in report.remainder().itertuples():
            self.remainder[f"{row.module}: {row.operation}"] += float(row.remainder)
        named = dict.fromkeys([*filter(None, self.rules.split("; ")), report.name])
        self.rules = "; ".join(named)


@dataclass(frozen=True, eq=False)
class _Way:
    """What is captured of a task's pairs, and how."""

    sites: Sites
    task: TaskLike
    rules: Rules
    names: tuple[str, ...]
    """Whose activations are kept."""
    coefficients: tuple[str, ...]
    """Where coefficients are."""
    own: str
    other: str
    blocks: int | None
    strict: bool

    @classmethod
    def of(
        cls,
        sites: Sites,
        task: TaskLike,
        rules: Rules,
        names: tuple[str, ...],
        coefficients: tuple[str, ...] | None,
        own: str,
        blocks: int | None,
        strict: bool,
    ) -> _Way:
        wanted = names if coefficients is None else coefficients
        kept, at = (tuple(dict.fromkeys([ROOT, *n])) for n in (names, wanted))
        other = "corrupt" if own == "clean" else "clean"
        whole = blocks is None or blocks >= len(sites.blocks)
        return cls(sites, task, rules, kept, at, own, other, None if whole else blocks, strict)

    def differentiated(self, moved: Values = NOTHING, *, cut: bool = False) -> _Found:
        """The run, with some values moved; `cut`: sites before these get nothing.

        The other run is there if none is moved.
        """
        if self.blocks is not None:
            return self._by_block(self.blocks, moved, cut=cut)
        with self._propagated(part=False) as report:
            values, metric = self._differentiable(report, moved)
        at = {n: values[n] for n in self.coefficients}
        seen = self.sites.gathered({n: values[n] for n in self.names})
        found = _Found(seen, metric.detach().to(self.sites.device))
        if self.rules.partway:  # before there is a reference run: the less is kept for it
            with report.with_itself():
                slopes = self._slopes(metric, at, None, cut=cut, again=True)
            found.slopes = self.sites.gathered(slopes)
        if not moved:
            with ExitStack() as stack:
                if self.rules.needs_reference:
                    stack.enter_context(report.reference())
                found.others, found.other_metric = observe(
                    self.sites, self.task, self.names, side=self.other
                )
        found.coefficients = self.sites.gathered(self._slopes(metric, at, None, cut=cut))
        found.note(report)
        return found

    def _by_block(self, blocks: int, moved: Values, *, cut: bool) -> _Found:
        """The same, with the graph of that many blocks at a time."""
        sites, starts = self.sites, range(0, len(self.sites.blocks), blocks)
        stream = [entries(sites)[first] for first in starts]
        names = tuple(dict.fromkeys((*self.names, *stream)))
        with output_shapes(sites) as outputs:
            values, metric = observe(sites, self.task, names, side=self.own, moved=moved)
        values = _away(values)
        found = _Found({n: values[n] for n in self.names}, metric)
        others: Values = NOTHING
        if not moved:
            others, found.other_metric = observe(sites, self.task, names, side=self.other)
            others = _away(others)
            found.others = {n: others[n] for n in self.names}
        attached: set[tuple[str, str]] = set()
        behind = ""  # the entry of the blocks that were differentiated last
        for first, entry in reversed(list(zip(starts, stream, strict=True))):
            part = _Part(range(first, first + blocks), entry, behind, outputs)
            with self._propagated(part=True) as report:
                at, result = self._differentiable(report, {entry: values[entry], **moved}, part)
            attached |= report.attached
            if behind:
                part.must_hand_on(result, values[behind])
            if self.rules.partway:
                with report.with_itself():
                    above = found.slopes.get(behind)
                    found.slopes |= _away(self._slopes(result, at, above, cut=cut, again=True))
            if self.rules.needs_reference:
                with report.reference():
                    self._run(report, self.other, {entry: others[entry]}, part)
            above = found.coefficients.get(behind)
            found.coefficients |= _away(self._slopes(result, at, above, cut=cut))
            found.note(report)
            behind = entry
        must_have_attached(self.rules, attached)
        for table in (found.coefficients, found.slopes):
            for name in table.keys() - set(self.coefficients):
                del table[name]
        return found

    def _differentiable(
        self, report: Propagation, moved: Values, part: _Part | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The own run, of which everything has gone past the rules."""
        with torch.enable_grad():
            values, result = self._run(report, self.own, moved, part)
        report.must_have_seen(result)
        return values, result

    def needed(self, live: Live) -> Need:
        """The bytes of one pair, of parts that are run one by one."""
        sites, end = self.sites, len(self.sites.blocks) - 1
        before = live.begin()
        with output_shapes(sites) as outputs:
            stream = observe(sites, self.task, (ROOT,), side=self.own)[0][ROOT]
        forward = live.peak - before  # as of the other run, beside the graph of the own one
        kinds = [_kind(sites, b.layer) for b in sites.blocks[:-1]]
        found = {kind: self._part_needs(live, stream, kinds.index(kind), outputs)
                 for kind in dict.fromkeys(kinds)}  # fmt: skip
        last = self._part_needs(live, stream, end, outputs)
        parts = [*(found[kind] for kind in kinds), last]
        graph, values, coefficients = (
            sum(getattr(p, n) for p in parts) for n in ("graph", "values", "coefficients")
        )
        first = coefficients if self.rules.partway else 0  # there before the last backward
        coefficients += first
        kept = 2 * values + coefficients
        starts = stream.nbytes * sum(name not in self.names for name in entries(sites)[:-1])
        # the coefficients come one by one, from the last block on
        most = max([last.peak, *(coefficients + p.peak for p in parts[:-1])])
        return Need(
            whole=graph + values + first + max(forward, *(p.peak - p.graph for p in parts)),
            block=2 * (values + starts) + most,
            away=values + starts + max(p.peak for p in parts),
            more=max(p.graph for p in parts),
            kept=kept,
        )

    def _part_needs(
        self, live: Live, stream: Tensor, layer: int, outputs: Mapping[int, int]
    ) -> _PartNeed:
        """The bytes of one block, of the last with what is behind it."""
        sites = self.sites
        behind = entries(sites)[layer + 1] if layer + 1 < len(sites.blocks) else ""
        part = _Part(range(layer, layer + 1), entries(sites)[layer], behind, outputs)
        before = live.begin()
        with self._propagated(part=True) as report:
            at, result = self._differentiable(report, {part.entry: stream}, part)
        above = torch.zeros_like(result) if behind else None
        if self.rules.partway:
            with report.with_itself():
                self._slopes(result, at, above, cut=False, again=True)
        if self.rules.needs_reference:
            with report.reference():
                self._run(report, self.other, {part.entry: stream}, part)
        graph = live.now - before
        coefficients = self._slopes(result, at, above, cut=False)
        widths = {n: c.nbytes for n, c in coefficients.items()}
        return _PartNeed(
            graph,
            live.peak - before,
            sum(stream.nbytes for n in self.names if part.holds(n)),
            sum(widths[n] for n in self.coefficients if part.holds(n)),
        )

    def _propagated(self, *, part: bool) -> Propagation:
        return Propagation(self.rules, root=self.sites.model, strict=self.strict, part=part)

    def _run(
        self, report: Propagation, side: str, moved: Values, part: _Part | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Values at the sites with coefficients, and what is differentiated: the metric, or what a
        part of the model hands on. Differentiable from block 0's input on, or from what is moved.
        """
        sites, task = self.sites, self.task
        tokens = getattr(task, side).to(sites.device)

        def leaf(name: str, value: Tensor) -> Tensor:
            return moved.get(name, value).to(value.device).detach().requires_grad_()

        edits: dict[str, Edit] = {n: partial(leaf, n) for n in (ROOT, *moved)}
        # Where a parallel block's attention and MLP read one tensor, each gets one of its own:
        # the coefficient there must be that of this reader alone.
        edits |= {n: _branch for n in self.coefficients if n.endswith((".mlp_in", ".mixer_in"))}
        edits |= answers_only(sites, task)
        names = (*self.names, *self.coefficients)
        with ExitStack() as stack:
            if part is not None:
                names, edits = part.names(self.coefficients), part.edits(edits)
                stack.enter_context(skipping(sites, part.others(sites), part.outputs))
            stack.enter_context(precise_logits(sites))
            stack.enter_context(editing(sites, edits))
            values = stack.enter_context(reading(sites, tuple(dict.fromkeys(names))))
            logits = sites.model(tokens)
            if part is not None and part.behind:
                return {n: values[n] for n in names if n != "final"}, values["final"]
            # Rules that compare two runs must see the metric to be exact through it. For the
            # others it is a plain function: a constant softmax would cut a probability metric off.
            if self.rules.needs_reference:
                return values, task.metric(logits)
        with report.paused():
            return values, task.metric(logits)

    def _slopes(
        self,
        result: Tensor,
        at: Values,
        above: Tensor | None,
        *,
        cut: bool,
        again: bool = False,
    ) -> dict[str, Tensor]:
        """d metric / d value at each site, if the result is worth `above` of the metric.

        `cut`: some sites lie before a value that was put in; `again`: there will be another
        backward.
        """
        if not result.requires_grad:
            if cut and above is not None:  # all that is differentiated lies before it
                return {n: torch.zeros_like(value) for n, value in at.items()}
            raise ValueError(
                "the metric must be differentiable in the logits; it does not depend on them, or "
                "not differentiably (argmax, detach); check the metric, and hooks that detach "
                "activations"
            )
        above = None if above is None else above.to(result.device)
        # pairs do not meet in the model: the gradient of the sum holds each pair's own gradient
        grads = torch.autograd.grad(
            result if above is not None else result.sum(), list(at.values()), above,
            allow_unused=True, retain_graph=again,
        )  # fmt: skip
        found = {}
        for (name, value), grad in zip(at.items(), grads, strict=True):
            if grad is None:
                # with constant attention patterns nothing reaches queries and keys: a true zero
                constant = self.rules.uses("softmax", "constant") and name.endswith((".q", ".k"))
                if not (cut or constant):
                    raise RuntimeError(
                        "every site must lie on the path from the input to the metric; "
                        f"{name!r} does not; check that no hook detaches activations and that the "
                        "metric uses logits"
                    )
                grad = torch.zeros_like(value)
            found[name] = grad
        return found


@dataclass(frozen=True, eq=False)
class _Part:
    """Some blocks, differentiated by themselves."""

    layers: range
    entry: str
    """The site of the stream that they begin with."""
    behind: str
    """That of the blocks behind them; empty for the last, which the metric is behind."""
    outputs: Mapping[int, int]
    """How each block returns, see `output_shapes`."""

    def names(self, coefficients: Sequence[str]) -> tuple[str, ...]:
        """The sites with coefficients in it, and what it hands on, which is seen as `final`."""
        inside = (n for n in coefficients if self.holds(n))
        return (self.entry, *inside, *(["final"] if self.behind else []))

    def edits(self, every: Mapping[str, Edit]) -> dict[str, Edit]:
        """Those inside of it."""
        inside = {n: edit for n, edit in every.items() if self.holds(n)}
        return inside | {"unembed": _one} if self.behind else inside

    def others(self, sites: Sites) -> list[int]:
        """The blocks that are no part of it."""
        return [b.layer for b in sites.blocks if b.layer not in self.layers]

    def holds(self, site: str) -> bool:
        """Whether a site is in it."""
        block = site.partition(".")[0]
        if block in ("final", "unembed"):
            return not self.behind
        return int(block[1:]) in self.layers

    def must_hand_on(self, found: Tensor, expected: Tensor) -> None:
        """Blocks that hand on more than the stream cannot be differentiated by themselves.

        Raises:
            RuntimeError: they computed something else than in a whole run.
        """
        found, expected = found.detach(), expected.to(found.device)
        error, scale = float((found - expected).abs().max()), float(expected.abs().max())
        if not error <= max(1e-4, 8 * torch.finfo(expected.dtype).eps) * max(scale, 1e-6):
            raise RuntimeError(
                "blocks that are differentiated by themselves must depend on the residual stream "
                f"alone; blocks {self.layers.start} to {self.layers.stop - 1} hand on what differs "
                f"by {error:.2g} of {scale:.2g} from a whole run; give shorter prompts or a device "
                "with more memory, so that the whole graph fits"
            )


class _PartNeed(NamedTuple):
    """Bytes of a part of the model, for one pair."""

    graph: int
    """Of what its backward needs."""
    peak: int
    """At most, in its backward."""
    values: int
    coefficients: int


def _kind(sites: Sites, layer: int) -> tuple[type, ...]:
    """What blocks that take the same memory have in common."""
    return tuple(type(module) for module in sites.model.blocks[layer].modules())


def _away(values: Values) -> dict[str, Tensor]:
    """In the memory of the machine: a device for which one graph is too much is kept free."""
    return {name: value.cpu() for name, value in values.items()}


def _branch(value: Tensor) -> Tensor:
    return value.view_as(value)


def _one(value: Tensor) -> Tensor:
    """The unembedding of what nobody reads."""
    return value[:1, :1]
