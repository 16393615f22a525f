"""Exact activation patching: the ground truth that scores are judged by.

A cell is one component at one position. Cells of a layer share forward passes (they are rows of
one batch), the blocks before that layer are skipped, and logits are computed only where a built-in
metric reads them. A cell that holds the same values in both runs (all that comes before the first
token that differs) has no effect and is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from relp.attribution import OWN, node_sites, provenance
from relp.capture import ROOT, answers_only, observe
from relp.scores import Component, Effects
from relp.sites import Block, Sites, editing

__all__ = ["patch"]

BATCH_BYTES = 96 << 20
"""Activations of one batch of cells; larger batches were not faster on a CPU."""


@dataclass(frozen=True)
class Cell:
    """One thing to patch: a component at a position."""

    component: Component
    row: int
    """Its place on the component axis of the result."""
    pos: int


def patch(
    model: Any,
    task: Any,
    *,
    components: Sequence[str] | None = None,
    direction: str = "denoise",
    batch_size: int | None = None,
    progress: bool = True,
) -> Effects:
    """Measures what patching each component at each position does to the metric.

    >>> effect = patch(model, task)            # nodes [pair, component, pos], as attribute's
    >>> effect = patch(model, task, components=["head", "L3.mlp"])

    `denoise`: the clean value is put into the corrupt run and the effect is the metric minus that
    of the corrupt run; `noise`: the other way round.

    Args:
        model: a `TransformerBridge` in eval mode. It is the same afterwards.
        task: a `tasks.Task`.
        components: names (`L3H1`) or kinds (`resid`, `attn`, `mlp`, `head`, `embed`); all if None.
        direction: `"denoise"` or `"noise"`.
        batch_size: cells per forward pass; by default as many as fit a fixed amount of memory.
        progress: show a bar.

    Returns:
        Effects in the unit of the metric, in the layout of `attribute(level="node")`.

    Raises:
        ValueError: an argument is wrong, or the model is in train mode.
    """
    if direction not in OWN:
        raise ValueError(
            f"`direction` must be 'denoise' or 'noise'; got {direction!r}; 'denoise' patches clean "
            "values into the corrupt run"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}; or leave it out")
    sites = Sites.of(model)
    names = _chosen(sites.components, components)
    own = OWN[direction]
    other = "corrupt" if own == "clean" else "clean"
    width = int(task.lengths.max())
    effects = torch.zeros(len(task), len(names), width)
    metrics = {s: torch.zeros(len(task)) for s in ("clean", "corrupt")}
    buckets = list(task.buckets())
    total = sum(len(names) * int(b.lengths[0]) for _, b in buckets)
    with tqdm(total=total, desc="exact patching", unit="cell", disable=not progress,
              leave=False) as bar:  # fmt: skip
        for index, bucket in buckets:
            with _output_shapes(sites) as outputs:
                base, own_metric = observe(sites, bucket, node_sites(sites), side=own)
            source, other_metric = observe(sites, bucket, node_sites(sites), side=other)
            metrics[own][index] = own_metric.float().cpu()
            metrics[other][index] = other_metric.float().cpu()
            run = _Runs(sites, bucket, own, base, source, outputs)
            cells = _cells(names, int(bucket.lengths[0]))
            changed = [c for c in cells if run.changes(c)]
            bar.update(len(cells) - len(changed))
            for batch in _batches(changed, bucket, sites, batch_size):
                values = run.patched(batch) - own_metric
                for cell, effect in zip(batch, values.float().cpu(), strict=True):
                    effects[index, cell.row, cell.pos] = effect
                bar.update(len(batch))
    labels = provenance(sites, task, direction, metrics)
    return Effects(rules="exact", components=names, nodes=effects, **labels)


@dataclass(frozen=True, eq=False)
class _Runs:
    """Patched runs of one bucket of pairs."""

    sites: Sites
    task: Any
    own: str
    base: dict[str, Tensor]
    source: dict[str, Tensor]
    outputs: dict[int, int]

    def patched(self, cells: Sequence[Cell]) -> Float[Tensor, "cell pair"]:
        """The metric with each cell patched; all cells are of one layer."""
        layer = max(cells[0].component.layer, 0)
        pairs, count = len(self.task), len(cells)
        tokens = getattr(self.task, self.own).to(self.sites.device).repeat(count, 1)

        def start(_: Tensor) -> Tensor:
            return self.base[f"L{layer}.resid"].repeat(count, 1, 1)

        edits: dict[str, Callable[[Tensor], Tensor]] = {f"L{layer}.resid": start}
        for site in dict.fromkeys(self._site(c) for c in cells):
            before = edits.get(site)
            edits[site] = self._writer(site, cells, before)
        edits |= answers_only(self.sites, self.task, count)
        skipping = _skipping(self.sites, layer, self.outputs)
        with torch.no_grad(), skipping, editing(self.sites, edits):
            logits = self.sites.model(tokens)
        return torch.stack([self.task.metric(part) for part in logits.split(pairs)])

    def changes(self, cell: Cell) -> bool:
        """False if the cell holds the very same values in both runs."""
        site, part = self._site(cell), self._part(cell)
        one, two = self.base[site], self.source[site]
        return not torch.equal(one[:, cell.pos, part], two[:, cell.pos, part])

    def _part(self, cell: Cell) -> slice:
        """Which entries of its site belong to the cell."""
        if cell.component.kind != "head":
            return slice(None)
        block = self.sites.blocks[cell.component.layer]
        size = self.base[block.name("z")].shape[-1] // block.heads
        return slice(cell.component.head * size, (cell.component.head + 1) * size)

    def _site(self, cell: Cell) -> str:
        kind, layer = cell.component.kind, cell.component.layer
        if kind == "embed":
            return ROOT
        return f"L{layer}.{'z' if kind == 'head' else kind}"

    def _writer(
        self, site: str, cells: Sequence[Cell], before: Callable[[Tensor], Tensor] | None
    ) -> Callable[[Tensor], Tensor]:
        """Overwrites the cells' own rows at one site."""
        pairs, source = len(self.task), self.source[site]

        def write(value: Tensor) -> Tensor:
            value = (value if before is None else before(value)).clone()
            for i, cell in enumerate(cells):
                if self._site(cell) == site:
                    rows, part = slice(i * pairs, (i + 1) * pairs), self._part(cell)
                    value[rows, cell.pos, part] = source[:, cell.pos, part]
            return value

        return write


def _chosen(known: tuple[str, ...], wanted: Sequence[str] | None) -> tuple[str, ...]:
    if wanted is None:
        return known
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    kinds = {Component.parse(n).kind for n in known}
    for name in wanted:
        if name not in known and name not in kinds:
            raise ValueError(
                f"`components` must be names such as {known[1]!r} or kinds out of "
                f"{sorted(kinds)}; got {name!r}; see Scores.components"
            )
    return tuple(n for n in known if n in wanted or Component.parse(n).kind in wanted)


def _cells(names: tuple[str, ...], length: int) -> list[Cell]:
    """All cells, those of one layer after those of the layer before."""
    parsed = [(row, Component.parse(n)) for row, n in enumerate(names)]
    parsed.sort(key=lambda item: max(item[1].layer, 0))
    return [Cell(c, row, pos) for row, c in parsed for pos in range(length)]


def _batches(
    cells: Sequence[Cell], task: Any, sites: Sites, batch_size: int | None
) -> Iterator[list[Cell]]:
    """Cells of one layer at a time, as many as one forward pass should hold."""
    cfg = sites.model.cfg
    if batch_size is None:
        values = 12 * int(cfg.d_model)
        if not task.metric.reads_answer_only:
            values += int(cfg.d_vocab)
        batch_size = max(1, BATCH_BYTES // (4 * len(task) * int(task.lengths[0]) * values))
    for _, group in groupby(cells, key=lambda c: max(c.component.layer, 0)):
        same_layer = list(group)
        for at in range(0, len(same_layer), batch_size):
            yield same_layer[at : at + batch_size]


# -- skipping blocks -------------------------------------------------------------------------------


@contextmanager
def _output_shapes(sites: Sites) -> Iterator[dict[int, int]]:
    """Notes how each block returns: 0 for a bare tensor, else the length of the tuple."""
    seen: dict[int, int] = {}

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[layer] = len(output) if isinstance(output, tuple) else 0

        return hook

    with ExitStack() as stack:
        for block in sites.blocks:
            module = sites.model.blocks[block.layer]
            stack.callback(module.register_forward_hook(note(block.layer)).remove)
        yield seen


@contextmanager
def _skipping(sites: Sites, layer: int, outputs: dict[int, int]) -> Iterator[None]:
    """Blocks before `layer` hand their input on, in the form in which they return."""

    def hand_on(size: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (size - 1)) if size else hidden

        return forward

    skipped: list[Block] = [b for b in sites.blocks if b.layer < layer]
    try:
        for block in skipped:
            # an attribute of the instance hides the method of its class until it is deleted;
            # a bridge's own __setattr__ would set it on the module that it wraps
            module = sites.model.blocks[block.layer]
            object.__setattr__(module, "forward", hand_on(outputs[block.layer]))
        yield
    finally:
        for block in skipped:
            vars(sites.model.blocks[block.layer]).pop("forward", None)
