"""Circuits on workers: the metric of each on each pair, cut by pairs, and by circuits if many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.engines.local import Answers, Engine, cut
from relp import ModelLike, TaskLike
from relp.bridge import Sites, undisturbed

__all__ = ["metrics_by"]

TOGETHER = 16
"""Circuits of a piece: each takes one run of the corrupt prompts, however many there are."""

Run = Callable[..., Any]
"""`circuit_metrics`: sites, task and circuits -> metrics `[circuit, pair]`."""
Circuits = Tensor | Sequence[Any]
"""Masks `[circuit, pos, writer, reader]`, or each a function of places (`circuits.masked`)."""
Metrics = Callable[[Circuits], Tensor]
"""Circuits -> metrics `[circuit, pair]`."""


@contextmanager
def metrics_by(
    engine: Engine | None, run: Run, sites: Sites, task: TaskLike, *, by_span: bool = False,
    progress: bool = False,
) -> Iterator[Metrics]:  # fmt: skip
    """While it is open, the metrics of circuits, by an engine.

    `run`: what runs them, `circuit_metrics`.

    >>> from circuits.engines import LocalEngine
    >>> from circuits.engines.masks import metrics_by
    >>> from circuits.masked import circuit_metrics
    >>> from relp.bridge import Sites
    >>> sites = Sites.of(model)
    >>> with metrics_by(LocalEngine(), circuit_metrics, sites, task) as metrics:
    ...     metrics(sites.layout.exists[None, None]).shape
    torch.Size([1, 4])
    """
    if engine is None:
        yield partial(run, sites, task, by_span=by_span, progress=progress)
        return
    # of one length: pairs of several would run in more batches
    order = sorted(range(len(task)), key=task.lengths.tolist().__getitem__)
    groups = cut(order, [1] * len(order), engine.workers)
    begin = partial(_measuring, run, sites.neurons, by_span)
    with engine.working(begin, sites.model, task) as answers:
        yield partial(_spread, answers, groups, engine.workers, progress)


class _Block(NamedTuple):
    """Some circuits on some pairs."""

    circuits: list[int]
    pairs: list[int]
    each: Circuits

    def __str__(self) -> str:
        first, last = (f"{name}s {n[0]}–{n[-1]}" for name, n in
                       (("circuit", self.circuits), ("pair", self.pairs)))  # fmt: skip
        return f"{first} on {last}"


def _spread(
    answers: Answers,
    groups: list[list[int]],
    workers: int,
    progress: bool,
    circuits: Circuits,
) -> Float[Tensor, "circuit pair"]:
    """The metric of each circuit on each pair, of pieces as they come."""
    count = len(circuits)
    # few pairs: the circuits are divided, too
    parts = max(-(-count // TOGETHER), -(-workers // len(groups)))
    some = cut(range(count), [1] * count, parts)
    blocks = [_Block(c, pairs, _these(circuits, c)) for c, pairs in product(some, groups)]
    found = torch.zeros(count, sum(map(len, groups)))
    with tqdm(total=found.numel(), desc="circuits", unit="run", disable=not progress,
              leave=False) as bar:  # fmt: skip
        for (block,), metrics in answers([block] for block in blocks):
            found[torch.tensor(block.circuits)[:, None], block.pairs] = metrics
            bar.update(metrics.numel())
    return found


def _these(circuits: Circuits, numbers: list[int]) -> Circuits:
    if isinstance(circuits, Tensor):  # a view would be sent with all that it is a view of
        return circuits[numbers].clone()
    return [circuits[i] for i in numbers]


def _measuring(
    run: Run, neurons: tuple[str, ...], by_span: bool, model: ModelLike, task: TaskLike
) -> Callable[[list[_Block]], Float[Tensor, "circuit pair"]]:
    """What measures a block in a worker."""

    @undisturbed
    def measured(model: ModelLike, block: _Block) -> Tensor:
        sites, pairs = Sites.of(model).splitting(neurons), task.select(block.pairs)
        found: Tensor = run(sites, pairs, block.each, by_span=by_span)
        return found

    return lambda piece: measured(model, *piece)
