"""Parts of a list of cells, for machines that share nothing but files, and what they are merged to.

Every machine makes the whole list, the same as all others, measures its part of it, and saves the
effects, which are NaN elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.choices import check_shard
from circuits.engines.local import cut
from circuits.exact.cells import Cell
from circuits.exact.sweep import (
    must_be_alike,
    must_measure_alike,
    precision,
    safetensors_path,
)
from relp import Component, EdgeEffects, Effects, NodeEffects, Provenance, Scores

__all__ = ["merge_effects", "sharded", "shard_title"]

TITLE = re.compile(r"(?P<rules>.*), shard (?P<number>\d+)/(?P<count>\d+)")


def sharded(cells: Sequence[Cell], shard: str | None, blocks: int) -> list[Cell]:
    """The cells of a shard, all if it is None; those of one block stay together where they can.

    >>> from circuits.exact import Cell
    >>> from circuits.exact.shards import sharded
    >>> cells = [Cell(name) for name in ("L0.mlp", "L1.mlp", "L0H0", "L1H0", "L1H1")]
    >>> [str(cell) for cell in sharded(cells, "1/2", 2)]
    ['L0.mlp', 'L0H0']

    Raises:
        ValueError: it is no shard, or there are fewer cells than shards.
    """
    if shard is None:
        return list(cells)
    number, count = check_shard(shard)
    starts = {cell: _first_block(cell, blocks) for cell in cells}
    order = sorted(cells, key=starts.__getitem__)
    # a run from an early block on takes longer
    parts = cut(order, [blocks + 1 - starts[cell] for cell in order], count)
    if len(parts) < count:
        raise ValueError(
            f"a shard must have a cell or more; {count} shards are too many for {len(cells)} "
            "cells; ask for fewer"
        )
    return parts[number - 1]


def shard_title(rules: str, shard: str | None) -> str:
    """What effects of a shard are called."""
    return rules if shard is None else "{}, shard {}/{}".format(rules, *check_shard(shard))


def merge_effects(
    *parts: Effects | str | Path, into: str | Path | None = None
) -> NodeEffects | EdgeEffects:
    """The effects that all shards of a list of cells have measured.

    >>> from circuits.exact import merge_effects
    >>> files = [f"part{i}.safetensors" for i in (1, 2)]
    >>> for i, file in enumerate(files, 1):                      # on two machines
    ...     part = patch(model, task, components=["mlp"], shard=f"{i}/2", progress=False)
    ...     _ = part.save(file)
    >>> effect = merge_effects(*files, into="effects.safetensors")
    >>> effect.rules
    'exact'

    Args:
        parts: effects of `patch` or `verify` with a `shard`, or files of them; every shard once.
        into: a `.safetensors` file for the result.

    Raises:
        ValueError: parts are missing, given twice, no shards, or not of the same model, task,
            options and sample; or the same runs have given them other metrics.
        OSError: a file cannot be read or written.
    """
    target = None if into is None else safetensors_path(into, "`into`")
    shards = [_Shard.of(part) for part in parts]
    _must_be_apart(shards)
    whole = shards[0].effects
    for other in shards[1:]:
        _must_be_alike(whole, other.effects)
        if bool((_measured(whole) & _measured(other.effects)).any()):
            raise ValueError(
                "shards must be cut from one list of cells; those that are merged share some, so "
                "that the lists differ; measure all with the same options"
            )
        changes: dict[str, Any] = {
            "resolution": max(whole.resolution, other.effects.resolution),
            f"{whole.level}s": torch.where(whole.table.isnan(), other.effects.table, whole.table),
        }
        whole = replace(whole, **changes)
    _must_be_all(shards, whole)
    whole = replace(whole, provenance=replace(whole.provenance, rules=shards[0].rules))
    if target is not None:
        whole.save(target)
    return whole


@dataclass(frozen=True, eq=False)
class _Shard:
    """Effects of a part of a list of cells."""

    effects: NodeEffects | EdgeEffects
    rules: str
    """Of the whole."""
    number: int
    count: int
    label: str
    """What an error calls it."""

    @classmethod
    def of(cls, part: Effects | str | Path) -> _Shard:
        """Effects, or the file of them.

        Raises:
            ValueError: they are no shard.
        """
        effects = part if isinstance(part, Scores) else Scores.load(part)
        label = effects.rules if isinstance(part, Scores) else str(part)
        match = TITLE.fullmatch(effects.rules)
        if match is None or not isinstance(effects, NodeEffects | EdgeEffects):
            raise ValueError(
                "parts to merge must be effects that were measured with a `shard`; those of "
                f"{label!r} are {effects.rules!r}; leave them out"
            )
        number, count = int(match["number"]), int(match["count"])
        return cls(effects, match["rules"], number, count, label)


def _must_be_apart(shards: Sequence[_Shard]) -> None:
    """Refuses none, shards of other numbers of them, and one that is there twice."""
    if not shards:
        raise ValueError("`parts` must be effects or their files; got none; give every shard")
    seen: dict[int, _Shard] = {}
    for one in shards:
        if one.count != shards[0].count:
            raise ValueError(
                f"parts to merge must be shards of as many; {shards[0].label!r} is one of "
                f"{shards[0].count} and {one.label!r} one of {one.count}; merge those of one kind"
            )
        if one.number in seen:
            raise ValueError(
                f"every shard must be given once; {one.number}/{one.count} is there twice, "
                f"{seen[one.number].label!r} and {one.label!r}; leave one out"
            )
        seen[one.number] = one


def _must_be_all(shards: Sequence[_Shard], whole: NodeEffects | EdgeEffects) -> None:
    """Refuses the effects of some shards only, and says which are missing."""
    count, there = shards[0].count, {one.number for one in shards}
    unknown, cells = int((_cells(whole) & ~_measured(whole)).sum()), int(_cells(whole).sum())
    if missing := [str(n) for n in range(1, count + 1) if n not in there]:
        share = f", with {unknown:,} of {cells:,} cells" if whole.strata is None else ""
        raise ValueError(
            f"all {count} shards must be there; {len(missing)} are missing{share}: "
            f"{', '.join(missing)}; measure them, or give them too"
        )
    # of edges, and of a sample, the others were not asked for
    if unknown and whole.strata is None and isinstance(whole, NodeEffects):
        raise ValueError(
            f"shards must be cut from one list of cells; {unknown:,} of {cells:,} are in none of "
            "those that are merged; measure all with the same options"
        )


def _cells(effects: NodeEffects | EdgeEffects) -> Bool[Tensor, "*cell"]:
    """Where the table, without pairs, has cells."""
    if isinstance(effects, EdgeEffects):
        return effects.layout.exists.expand(effects.table.shape)
    return torch.ones(effects.table.shape[1:], dtype=torch.bool)


def _measured(effects: NodeEffects | EdgeEffects) -> Bool[Tensor, "*cell"]:
    """Which of them hold numbers."""
    known = ~effects.table.isnan()
    return _cells(effects) & (known if isinstance(effects, EdgeEffects) else known.any(0))


def _must_be_alike(one: NodeEffects | EdgeEffects, other: NodeEffects | EdgeEffects) -> None:
    """Refuses effects of another model, task or options, and of another sample."""
    must_be_alike("parts", _labels(one), _labels(other))
    eps = precision(one.provenance.dtype)
    must_measure_alike("parts", one, other, eps, "clean", "corrupt")
    if not _equal(one.strata, other.strata):
        raise ValueError(
            "parts to merge must be of the same sample; theirs were drawn by other scores; measure "
            "all with one `seed` and the same scores"
        )


def _labels(effects: NodeEffects | EdgeEffects) -> Mapping[str, Any]:
    """What must be the same in all parts, but for numbers."""
    source = {f.name: getattr(effects.provenance, f.name) for f in fields(Provenance)}
    source["rules"] = match["rules"] if (match := TITLE.fullmatch(effects.rules)) else ""
    pairs, count = effects.pairs, len(effects.clean)
    parts: Any = effects.components if isinstance(effects, NodeEffects) else (
        effects.writers, effects.readers
    )  # fmt: skip
    return source | {
        "level": str(effects.level),
        "components": parts,
        "pairs": count,
        "lengths": pairs.lengths.tolist(),
        "spans": {name: at.tolist() for name, at in pairs.spans.items()},
        "prompts": pairs.prompt,
        "positions": list(effects.table.shape),
    }


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _first_block(cell: Cell, blocks: int) -> int:
    """Where a run with a cell begins, as far as its name tells."""
    owner = Component.of_reader(cell.reader)[0] if cell.reader else Component.parse(cell.component)
    return blocks if owner.kind == "logits" else max(0, owner.layer)
