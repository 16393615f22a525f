"""The residual stream: what each writer adds to it, what each reader gets, and through which norm.

A forward pass is a row of places. At each a module reads the stream as the writers before it have
left it, and its own writers add to it; the last place is where the logits read. Estimates, exact
effects and circuits all walk along these places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from relp.bridge.basis import Basis, Slot, bias, device_of
from relp.bridge.norms import NormMap
from relp.bridge.sites import Sites
from relp.rulebook import DEEPLIFT

__all__ = [
    "NO_STREAM",
    "REBUILT",
    "Place",
    "Reading",
    "changes",
    "difference",
    "exact_changes",
    "must_match",
    "normed",
    "stream_places",
    "reader_sites",
    "readings",
    "received",
    "stream_sites",
    "what_is_added",
    "writer_changes",
]

REBUILT = "{} must be what the model computes; rebuilt it"
NO_STREAM = (
    "if the model normalises the stream itself (BERT, OPT-350m), or its attention has a rule for "
    "linear layers, it has no edges in this sense: use level='node'"
)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a module reads the stream, and writes to it."""

    basis: Basis
    layer: int
    """The number of blocks where the logits read."""
    entry: str
    """The site of the stream that is read: `L3.resid`, `L3.mid` or `final`."""
    heard: slice
    """The rows of the writers that have added to it."""
    rows: slice
    """The rows of the writers that add here; they write to what later places read."""
    columns: slice
    """The columns of the readers here."""

    @property
    def follows(self) -> bool:
        """Whether all writers before these are heard: not where the MLP is beside attention."""
        return self.heard.stop == self.rows.start

    def __str__(self) -> str:
        if self.entry == "final":
            return "the final residual stream"
        end = "middle" if self.entry.endswith(".mid") else "input"
        return f"the {end} of block {self.layer}"


def stream_places(sites: Sites) -> Iterator[Place]:
    """All places, in the order of a forward pass; row 0 is the embedding."""
    row, column = 1, 0
    for block in sites.blocks:
        first = row
        for module in block.modules:
            middle = module is block.mlp and not block.parallel
            rows = slice(row, row := row + len(module.writers))
            columns = slice(column, column := column + len(module.readers))
            heard = slice(0, rows.start if middle else first)
            entry = block.name("mid" if middle else "resid")
            yield Place(module, block.layer, entry, heard, rows, columns)
    end = slice(row, row)
    read = Basis("logits", None, entry="final")  # it writes nothing
    yield Place(read, len(sites.blocks), "final", slice(0, row), end, slice(column, column + 1))


class Reading(NamedTuple):
    """Where one reader reads: at which place, and which reader of which slot it is."""

    place: Place
    slot: Slot | None
    """None for a module as a whole, or the rest of it."""
    number: int = 0

    @property
    def name(self) -> str:
        """`L3H1.q`, `L3.mlp.in`."""
        return self.slot.readers[self.number] if self.slot else self.place.basis.readers[-1]

    @property
    def site(self) -> str:
        """The (first) site of what it gets."""
        return self.slot.through[0].site if self.slot else self.place.basis.entry

    def part(self, site: str, width: int) -> slice:
        """The entries of what it gets at one of its sites, which has this width."""
        if self.slot is None:
            return slice(0, width)
        (matrix,) = (m for m in self.slot.through if m.site == site)
        return matrix.span(self.slot.numbers[self.number], width)


def readings(sites: Sites) -> dict[str, Reading]:
    """Where each reader of a model reads."""
    found: dict[str, Reading] = {}
    for place in stream_places(sites):
        for slot in place.basis.slots:
            found |= {name: Reading(place, slot, i) for i, name in enumerate(slot.readers)}
        if place.basis.entry:
            found[place.basis.readers[-1]] = Reading(place, None)
    return found


def stream_sites(sites: Sites) -> tuple[str, ...]:
    """The sites of the stream, and of what is written to it."""
    found: list[str] = []
    for place in stream_places(sites):
        found += [place.entry]
        found += place.basis.writing if place.rows.start < place.rows.stop else ()
    return tuple(dict.fromkeys(found))


def reader_sites(sites: Sites) -> tuple[str, ...]:
    """The sites of what readers get, and of the stream where blocks begin."""
    found: list[str] = []
    for place in stream_places(sites):
        ends = [] if place.entry.endswith(".mid") else [place.entry]
        found += [*ends, *place.basis.reading]
    return tuple(dict.fromkeys(found))


# -- what writers add ------------------------------------------------------------------------------


def changes(
    basis: Basis,
    step: Float[Tensor, "pair pos parts_d_part"],
    norm: Callable[[Float[Tensor, "pair pos d_model"]], NormMap],
    into: Tensor | None = None,
) -> Float[Tensor, "part pair pos d_model"]:
    """What each part of a module adds differently if its parts' values differ by `step`.

    `norm`: the map of the norm behind the parts, given by how much they differ together; asked for
    only if there is one.
    """
    added = basis.added(step, into)
    if basis.post is None:
        return added
    return added.copy_(norm(basis.together(step, added)).push(added))


def exact_changes(
    basis: Basis,
    step: Float[Tensor, "pair pos parts_d_part"],
    behind: Float[Tensor, "pair pos d_model"] | None,
) -> Float[Tensor, "part pair pos d_model"]:
    """`changes` whose sum is by how much the module's output differs.

    A norm that read `behind` before anything differed is split over the parts as `DEEPLIFT` does.
    """

    def norm(moved: Float[Tensor, "pair pos d_model"]) -> NormMap:
        assert behind is not None
        return NormMap.of(basis.post, behind, behind + moved, DEEPLIFT)

    return changes(basis, step, norm)


def difference(own: Mapping[str, Tensor], other: Mapping[str, Tensor], site: str) -> Tensor:
    """Other minus own at a site; half precision is widened before, not behind."""
    wider = torch.promote_types(own[site].dtype, torch.float32)
    return other[site].to(wider) - own[site].to(wider)


def writer_changes(
    basis: Basis, own: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "pair pos d_model"]]:
    """What each writer of a module would add to the stream with the other values at its sites."""
    found: dict[str, Tensor] = {}
    if basis.out and basis.parts:
        step = difference(own, other, basis.out.site)
        parts = exact_changes(basis, step, own.get(basis.behind))
        found = dict(zip(basis.parts, parts, strict=True))
    if basis.entry:
        whole = difference(own, other, basis.component)
        found[basis.component] = whole - sum(found.values()) if found else whole
    return found


def what_is_added(basis: Basis, own: Mapping[str, Tensor]) -> Float[Tensor, "pair pos d_model"]:
    """All that a module adds to the stream, put together from what its parts hold.

    Raises:
        RuntimeError: its parts do not give what the model has behind them.
    """
    if not basis.out or not basis.parts:
        return own[basis.component]
    values = own[basis.out.site]
    found, offset = basis.together(values, basis.added(values)), bias(basis.out.module)
    found = found if offset is None else found + offset.to(found.device)
    if not basis.entry and basis.post is None:
        return found
    must_match(found, own[basis.behind], REBUILT.format(f"what the parts of {basis.component} add"))
    return own[basis.component]


# -- what readers get ------------------------------------------------------------------------------


def normed(
    basis: Basis, streams: Float[Tensor, "reader pair pos d_model"]
) -> Float[Tensor, "reader pair pos d_model"]:
    """What readers of a module get who each read a stream of their own."""
    if basis.norm is None:
        return streams
    with torch.no_grad():
        found: Tensor = basis.norm(streams.flatten(0, 1).to(device_of(basis.norm)))
    return found.to(streams.device).view_as(streams)


def received(
    readers: Sequence[Reading], streams: Float[Tensor, "reader pair pos d_model"]
) -> dict[str, Float[Tensor, "reader pair pos d_part"]]:
    """What readers of one slot hold at each of its sites if each reads a stream of its own."""
    place, slot, _ = readers[0]
    x = normed(place.basis, streams)
    return slot.project(x, [r.number for r in readers]) if slot else {place.basis.entry: x}


# -- checks ----------------------------------------------------------------------------------------


def must_match(
    found: Tensor,
    expected: Tensor,
    what: str,
    otherwise: str = NO_STREAM,
    *,
    rounded: Tensor | None = None,
) -> None:
    """A part of the model that was overlooked would make numbers wrong without a sign.

    `rounded`: the activations that `expected` is a difference of, if it is one: their rounding is
    in it.

    Raises:
        RuntimeError: `what`, the beginning of a sentence, misses by more than rounding.
    """
    error = float((found - expected).abs().max())
    scale = float(expected.abs().max())
    values = expected if rounded is None else rounded
    # half precision rounds each sum
    finest = 8 * torch.finfo(values.dtype).eps * float(values.abs().max())
    if error > max(1e-3 * scale, finest, 1e-9):
        raise RuntimeError(
            f"{what} misses by {error:.2g} of {scale:.2g}; remove hooks that change "
            f"activations; {otherwise}"
        )
