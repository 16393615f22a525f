"""Names of components, and who can hear whom: the writers, the readers and the edges of a model.

Names of components: `embed`, head `L9H6`, key/value head `L9KV1` (grouped-query attention),
MLP neuron `L9N17`, `L9.attn`, `L9.mlp`, `L9.mixer`, residual stream entering block 9 `L9.resid`,
`logits`; of a sparse dictionary, feature `L9.mlp/f1021` and what no feature holds, `L9.mlp/rest`.
A reader adds a slot: `L9H6.q`, `L9KV1.k`, `L3.mlp.in`, `logits.in`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

__all__ = ["Component", "Layout"]

_NAME = re.compile(
    r"(?P<plain>embed|logits)"
    r"|L(?P<layer>\d+)(?:H(?P<head>\d+)|KV(?P<kv>\d+)|N(?P<neuron>\d+)"
    r"|\.(?P<kind>attn|mlp|mixer|resid))"
)
_FEATURE = re.compile(
    r"(?P<site>L(?P<layer>\d+)\.(?P<part>[a-z]+)|final)/(?:f(?P<feature>\d+)|rest)"
)
_SLOTS = ("q", "k", "v", "in")
_WITHIN_LAYER = {"kv": 0, "head": 1, "attn": 1, "mixer": 1, "neuron": 2, "mlp": 3}


class Component(NamedTuple):
    """A component's name taken apart; `layer` and `head` are -1 where there is none.

    >>> Component.parse("L9H6")
    Component(name='L9H6', kind='head', layer=9, head=6)
    """

    name: str
    kind: str
    """embed, head, kv, neuron, attn, mlp, mixer, resid, feature, rest or logits."""
    layer: int
    head: int
    """Number of the head, key/value head or neuron in its layer, or of the feature at its site."""

    @classmethod
    def parse(cls, name: str) -> Component:
        """Takes a component's name apart.

        Raises:
            ValueError: `name` is not a component's name.
        """
        match = _NAME.fullmatch(name)
        if match is None and (part := _FEATURE.fullmatch(name)):
            layer = int(part["layer"] or -1)
            number = part["feature"]
            return cls(name, "feature" if number else "rest", layer, int(number or -1))
        if match is None:
            raise ValueError(
                f"a component must be named like embed, L9H6, L9KV1, L9N17, L9.mlp, L9.attn, "
                f"L9.resid, L9.mlp/f1021 or logits; got {name!r}; a reader's slot (.q .k .v .in) "
                "is not part of the name"
            )
        if match["plain"]:
            return cls(name, match["plain"], -1, -1)
        layer = int(match["layer"])
        for kind in ("head", "kv", "neuron"):
            if match[kind] is not None:
                return cls(name, kind, layer, int(match[kind]))
        return cls(name, match["kind"], layer, -1)

    @staticmethod
    def of_reader(reader: str) -> tuple[Component, str]:
        """`"L9H6.q"` -> (component L9H6, slot `"q"`)."""
        name, _, slot = reader.rpartition(".")
        if slot not in _SLOTS:
            raise ValueError(
                f"a reader must end in one of {_SLOTS}; got {reader!r}; write for instance "
                "L9H6.q, L3.mlp.in or logits.in"
            )
        return Component.parse(name), slot


@dataclass(frozen=True)
class Layout:
    """Writers are the rows and readers the columns of a table of edges.

    >>> edges.layout.row["L1H1"], edges.layout.column["logits.in"]
    (11, 150)
    >>> int(edges.layout.exists.sum())
    3628
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    parallel: bool = False
    """MLPs do not read what their own block's heads write (GPT-J, GPT-NeoX, Falcon, Phi)."""

    def __post_init__(self) -> None:
        for what, names in (("writer", self.writers), ("reader", self.readers)):
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(
                    f"every {what} must be named once; got {twice!r} {names.count(twice)} times; "
                    "leave the others out"
                )

    @staticmethod
    @lru_cache(maxsize=8)
    def of(writers: tuple[str, ...], readers: tuple[str, ...], parallel: bool) -> Layout:
        """The layout of these names, made once."""
        return Layout(writers, readers, parallel)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy, and what another process gets, is the one that is there, and carries no mask
        return Layout.of, (self.writers, self.readers, self.parallel)

    @cached_property
    def row(self) -> Mapping[str, int]:
        """The place of each writer."""
        return {name: i for i, name in enumerate(self.writers)}

    @cached_property
    def column(self) -> Mapping[str, int]:
        """The place of each reader."""
        return {name: i for i, name in enumerate(self.readers)}

    @cached_property
    def sources(self) -> tuple[Component, ...]:
        """The writers taken apart."""
        return tuple(map(Component.parse, self.writers))

    @cached_property
    def targets(self) -> tuple[tuple[Component, str], ...]:
        """The readers taken apart: component and slot."""
        return tuple(map(Component.of_reader, self.readers))

    @cached_property
    def exists(self) -> Bool[Tensor, "writer reader"]:
        """Which edges there are: what the writer adds to the stream is there when the reader reads.

        Where MLPs are parallel to attention, they and their neurons do not hear their own block's
        heads. Not to be changed.
        """
        steps = (
            [_written(writer) for writer in self.sources],
            [_read(owner, parallel=self.parallel) for owner, _ in self.targets],
        )
        with torch.inference_mode(False):  # it outlives the mode in which it is first asked for
            written, read = (torch.tensor(s, dtype=torch.float64, device="cpu") for s in steps)
            return written[:, None] < read

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """Who writes or reads, from `embed` to `logits` as a forward pass meets them."""
        found = {c.name: c for c in (*self.sources, *(owner for owner, _ in self.targets))}
        return tuple(sorted(found.values(), key=_depth))

    @cached_property
    def serves(self) -> Mapping[str, tuple[str, ...]]:
        """The query heads of each key/value head: they are split evenly over these, in order.

        Raises:
            ValueError: the query heads of a layer do not divide evenly over its key/value heads.
        """
        layers: dict[int, dict[str, list[str]]] = {}
        for c in self.components:
            layers.setdefault(c.layer, {}).setdefault(c.kind, []).append(c.name)
        found: dict[str, tuple[str, ...]] = {}
        for layer, kinds in layers.items():
            sources, heads = kinds.get("kv", []), kinds.get("head", [])
            group, rest = divmod(len(heads), len(sources) or 1)
            if rest:
                raise ValueError(
                    f"query heads must divide evenly over key/value heads: layer {layer} has "
                    f"{len(heads)} and {len(sources)}; give scores that hold all heads of a layer"
                )
            found |= {s: tuple(heads[i * group :][:group]) for i, s in enumerate(sources)}
        return found


# Each block takes three steps of a forward pass: it begins, its attention has written, it ends.


_AT_SITES = {"resid": -0.5, "z": 0.5, "attn": 1.0, "mixer": 1.0, "mid": 1.5, "neurons": 1.75,
             "mlp": 2.0}  # fmt: skip
"""The step of a block at which what a site holds is there, which features are parts of."""
_READING = 0.25
"""What the features of a site read was there so long before."""
_LATEST = 1e9
"""The step of `final`: behind all blocks."""


def _at_site(component: Component) -> float:
    """When the site of a feature, or of the rest beside features, holds what it is a part of."""
    site = component.name.partition("/")[0]
    if site == "final":
        return _LATEST
    return 3.0 * component.layer + _AT_SITES[site.partition(".")[2]]


def _written(writer: Component) -> float:
    """The step at which a component has written."""
    if writer.kind in ("feature", "rest"):
        return _at_site(writer)
    if writer.kind in ("embed", "logits"):
        return -math.inf if writer.kind == "embed" else math.inf
    return 3.0 * writer.layer + (1 if writer.kind in ("head", "attn", "mixer") else 2)


def _read(reader: Component, *, parallel: bool) -> float:
    """The step before which what it reads was written."""
    if reader.kind in ("feature", "rest"):
        return _at_site(reader) - _READING
    if reader.kind in ("embed", "logits"):
        return -math.inf if reader.kind == "embed" else math.inf
    behind = reader.kind in ("mlp", "neuron") and not parallel
    return 3.0 * reader.layer + (2 if behind else 0)


def _depth(component: Component) -> tuple[float, int, int | float]:
    """Sorts components from `embed` to `logits`."""
    if component.kind in ("feature", "rest"):
        layer, within = divmod(_at_site(component) + 0.5, 3.0)  # a block begins with its stream
        return layer, round(within), math.inf if component.kind == "rest" else component.head
    layer = math.inf if component.kind == "logits" else float(component.layer)
    return layer, _WITHIN_LAYER.get(component.kind, 0), component.head
