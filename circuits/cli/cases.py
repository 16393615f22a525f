"""What `relp bench` judges methods on: planted circuits, and models on tasks that they can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from circuits.judge.bench import Case, Loaded
from circuits.masked import ABLE
from tasks import able, planted, zoo
from tasks.registry import builder
from tasks.zoo.placement import Placement

__all__ = ["is_large", "planted_cases", "trained_cases"]

LARGE = 10e6
"""Weights from which on exact patching is of a sample, and of fewer pairs."""


def planted_cases(
    only: Sequence[str] | None, pairs: int, seed: int, noise: float, distractors: int
) -> Iterator[Case]:
    """The planted circuits, of one difficulty; `only` those."""

    for name in planted.names():
        if only and name not in only:
            continue
        yield Case(name, "planted", partial(_planted, name, pairs, seed, noise, distractors))


def _planted(name: str, pairs: int, seed: int, noise: float, distractors: int) -> Loaded:
    made: Any
    others: Any  # of a model with other noise, which is not used
    made, others = (
        planted.plant(name, pairs=pairs, seed=s, noise=noise, distractors=distractors)
        for s in (seed, seed + 1)
    )
    return Loaded(made.model, made.task, others.task, made.direction, made.edges, made.hidden)


def trained_cases(
    model: str, only: Sequence[str] | None, pairs: int, seed: int, placement: Placement
) -> Iterator[Case]:
    """A model on each task that it does on enough of the clean prompts; `only` those tasks."""
    group = Path(model).name or model
    known = able.recorded()
    shares = known[model] if model in known else able.measured(_loaded(model, placement))
    for name, share in shares.items():
        if share >= ABLE and (not only or name in only):  # NaN is not enough
            load = partial(_trained, model, name, pairs, seed, placement)
            yield Case(f"{name} · {group}", group, load, is_large(_loaded(model, placement)))


def _trained(model: str, name: str, pairs: int, seed: int, placement: Placement) -> Loaded:
    bridge = _loaded(model, placement)
    task: Any
    others: Any
    task, others = (builder(name)(bridge.tokenizer, pairs=pairs, seed=s) for s in (seed, seed + 1))
    return Loaded(bridge, task, others)


def is_large(model: Any) -> bool:
    """Whether patching all nodes of a few pairs takes more than a minute or so."""
    return sum(p.numel() for p in model.parameters()) >= LARGE


@lru_cache(maxsize=1)
def _loaded(model: str, placement: Placement) -> Any:
    return zoo.load(model, **vars(placement))
