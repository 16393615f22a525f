"""Edge scores of one capture: how much moving what one reader hears of one writer would do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relp.bridge.basis import weight
from relp.bridge.capture import ROOT, Capture
from relp.bridge.norms import NormMap
from relp.bridge.room import as_fits, available, is_shortage
from relp.bridge.sites import Sites
from relp.bridge.stream import (
    NO_STREAM,
    Place,
    changes,
    must_match,
    reader_sites,
    stream_places,
    stream_sites,
)
from relp.partway import weight_of_both
from relp.propagation import module_names
from relp.protocols import TaskLike
from relp.rulebook import Rules
from relp.scores import EdgeScores, Pairs, Provenance, span_index, span_places

__all__ = ["EdgeSums", "edge_scores", "position_groups", "tokens_at_once"]

WRITERS = "what embedding, heads and MLPs write must sum to the residual stream"
HEADS = "what the heads write must sum to the input of the norm behind them"
NEURONS_READ = "what the neurons read must sum to the coefficient at the MLP's input"
NEURONS_WRITE = "what the neurons write must sum to the MLP's output"
READERS_GET = "what the block's and all later readers get must sum to the stream's own coefficient"
READERS = 96
"""Readers whose scores are one product: with fewer it takes longer, with more it is no faster."""
CHUNK_BYTES = 256 << 20
"""Memory for the tokens at work."""
LEAST_TOKENS = 64
"""With fewer at a time, reading the weights for each chunk takes longer than the work on it."""
NO_NEURONS = (
    "if this MLP is more than two or three matrices, or has a rule for linear layers, leave its "
    "neurons out"
)


def position_groups(task: TaskLike, positions: bool | str) -> Int[Tensor, "pair pos"]:
    """The number of the group over which edge scores are summed, at each position of each pair."""
    pairs, length = task.clean.shape
    if positions == "spans":
        return span_index(task.spans, pairs, length)
    return torch.arange(length).expand(pairs, length) * bool(positions)


def edge_scores(
    sites: Sites,
    rules: Rules,
    group: Int[Tensor, "pair pos"],
    *tables: tuple[Capture, Float[Tensor, "group writer reader"]],
    share: float = 1.0,
    tokens: int | None = None,
) -> None:
    """Adds to a table the sum over each group of pairs and positions of Δ_writer · c_reader.

    c_reader is the coefficient at that reader's own input in the residual stream: the coefficient
    at its projection's output times the projection, pulled back through the block's norm under the
    same rules. Δ_writer is what the writer adds to the stream; heads and neurons behind a post-norm
    are pushed through it under the same rules. Nothing is copied per reader in the model, so
    grouped-query attention and any norm work as they are. Where neurons are split off, the MLP is
    the whole of it less those, as a writer and as a reader.
    Source: EAP, arXiv:2310.10348, with the coefficients of arXiv:2508.21258.

    Args:
        group: as `position_groups` gives them.
        tables: captures of one batch, and to what their scores are added, on any device. All are
            added for some tokens, or none.
        share: what the scores are multiplied by.
        tokens: positions, of whatever pair, at work at a time; memory is proportional to it. By
            default as many as `tokens_at_once`, and fewer where memory runs out.

    Raises:
        RuntimeError: what the writers add does not sum to the residual stream, what the readers
            get not to its coefficient, or memory runs out with a single token.
    """
    # tokens of one group are next to each other; all are where there is but one
    numbers, order = group.flatten().sort(stable=True)
    done, total = 0, len(order)
    several = bool(numbers[0] < numbers[-1])

    def go_on(size: int) -> None:
        nonlocal done
        buffer = _Buffer.of(sites, min(size, total - done))
        while done < total:
            chunk = slice(done, min(done + size, total))
            chosen, first = order[chunk] if several else chunk, int(numbers[done])
            counts = (numbers[chunk] - first).bincount().tolist()
            found = [
                _scores(sites, _at(seen, chosen, sites.device), rules, counts, buffer)
                for seen, _ in tables
            ]
            for (_, into), scores in zip(tables, found, strict=True):
                into[first : first + len(counts)].add_(scores.to(into.device), alpha=share)
            done = chunk.stop

    if tokens is None:
        tokens = tokens_at_once(sites, apart=several)
    try:
        as_fits(go_on, min(tokens, total), emptied=lambda: None)
    except RuntimeError as error:
        if not (done and is_shortage(error)):
            raise
        # no caller may take this for a shortage, and add the first tokens once more
        raise RuntimeError(
            f"edge scores must have memory for one token at a time; it ran out at token {done} of "
            f"{total}; score fewer pairs at a time (batch_size)"
        ) from error


def tokens_at_once(sites: Sites, *, apart: bool) -> int:
    """Tokens whose edge scores are computed at once; `apart`: each may be of another group."""
    writers, readers = len(sites.writers), len(sites.readers)
    rows = writers + _readers_at_once(sites)
    each = rows * int(sites.model.cfg.d_model) + writers * readers * apart
    return max(LEAST_TOKENS, CHUNK_BYTES // (4 * each))


def _readers_at_once(sites: Sites) -> int:
    """Readers of one product: at least those of one place."""
    return max(READERS, *(p.columns.stop - p.columns.start for p in stream_places(sites)))


class _At(Mapping[str, Tensor]):
    """Activations at some tokens of a batch, as if they were one pair, on one device."""

    def __init__(self, whole: Mapping[str, Tensor], chosen: Any, device: torch.device) -> None:
        self._whole, self._chosen, self._device = whole, chosen, device

    def __getitem__(self, site: str) -> Float[Tensor, "1 token d"]:
        value, chosen = self._whole[site], self._chosen
        if isinstance(chosen, Tensor):
            chosen = chosen.to(value.device)
        return value.flatten(0, 1)[chosen][None].to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


def _at(seen: Capture, chosen: Any, device: torch.device) -> Capture:
    """What was seen of some tokens; a slice of them is no copy, unless it is elsewhere."""

    def those(whole: Mapping[str, Tensor]) -> _At:
        return _At(whole, chosen, device)

    return replace(
        seen,
        own=those(seen.own),
        other=those(seen.other),
        values=those(seen.values),
        reference=those(seen.reference),
        coefficients=those(seen.coefficients),
    )


class _Buffer(NamedTuple):
    """Memory for one chunk after the other."""

    deltas: Float[Tensor, "writer token d_model"]
    coefficients: Float[Tensor, "reader token d_model"]

    @classmethod
    def of(cls, sites: Sites, tokens: int) -> _Buffer:
        """For chunks of so many tokens."""
        rows, width = (len(sites.writers), _readers_at_once(sites)), int(sites.model.cfg.d_model)
        return cls(*(torch.empty(n, tokens, width, device=sites.device) for n in rows))


def _scores(
    sites: Sites, seen: Capture, rules: Rules, counts: Sequence[int], buffer: _Buffer
) -> Float[Tensor, "group writer reader"]:
    """Edge scores of some tokens; `counts`: of each group in turn, so many of them."""
    tokens = sum(counts)
    # one row per writer and reader, so that products need no copy
    deltas, coefficients = (memory[:, None, :tokens] for memory in buffer)
    table = deltas.new_zeros(len(counts), len(deltas), len(sites.readers))
    ends = list(accumulate(counts))
    groups = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
    deltas[0] = seen.delta(ROOT)
    stream = deltas[0].clone()  # what all writers so far have added
    got = torch.zeros_like(stream)  # what this block's readers so far have got
    waiting: list[Place] = []  # whose readers' coefficients are there

    def multiply() -> None:
        """Scores of all whom the readers of the waiting places hear."""
        first, heard = waiting[0].columns.start, waiting[-1].heard
        readers = slice(waiting[-1].columns.stop - first)
        for scores, at in zip(table, groups, strict=True):
            ours, theirs = deltas[heard, :, at].flatten(1), coefficients[readers, :, at].flatten(1)
            products = ours @ theirs.T
            for place in waiting:
                columns = slice(place.columns.start - first, place.columns.stop - first)
                scores[place.heard, place.columns] = products[place.heard, columns]
        waiting.clear()

    def fill(place: Place) -> Float[Tensor, "1 token d_model"]:
        """Coefficients of the readers of a place; gives what these get together."""
        if place.follows:
            values, what = seen.own[place.entry], f"{WRITERS}; at {place} it"
            must_match(stream, seen.delta(place.entry), what, rounded=values)
        if waiting and place.columns.stop - waiting[0].columns.start > len(coefficients):
            multiply()
        waiting.append(place)
        first = waiting[0].columns.start
        into = coefficients[place.columns.start - first : place.columns.stop - first]
        _read(sites, place, seen, rules, into)
        return into.sum(0)

    walk = list(stream_places(sites))
    for place, following in pairwise(walk):
        got += fill(place)
        stream += _write(sites, place, seen, rules, deltas[place.rows])
        if following.layer != place.layer:
            later = seen.coefficients[following.entry].float()
            whole = seen.coefficients[sites.blocks[place.layer].name("resid")]
            must_match(got + later, whole, f"{READERS_GET}; at block {place.layer} it")
            got.zero_()
    fill(walk[-1])
    multiply()
    return table


def _norm_map(
    sites: Sites, norm: nn.Module | None, seen: Capture, site: str, rules: Rules
) -> NormMap:
    if norm is not None and rules.places:
        rules = rules.within(module_names(sites.model)[id(norm)])
    return NormMap.of(norm, seen.values[site], seen.reference[site], rules)


def _read(
    sites: Sites,
    place: Place,
    seen: Capture,
    rules: Rules,
    into: Float[Tensor, "reader pair pos d_model"],
) -> None:
    """Fills `into` with the coefficient at the stream of each reader of a place."""
    basis, at = place.basis, 0
    norm = _norm_map(sites, basis.norm, seen, place.entry, rules)
    for slot in basis.slots:
        if slot.readers:
            part = into[at : (at := at + len(slot.readers))]
            behind = slot.values(seen.coefficients)
            norm.pull_through(slot.read_in().flatten(0, 1).to(behind), behind, part)
    if not basis.entry:
        return
    behind = seen.coefficients[basis.entry]
    into[at] = norm.pull(behind.float())
    if at:
        matrices = [m for slot in basis.slots for m in slot.through]
        found = [c @ weight(m.module).to(c) for m in matrices
                 for c in [seen.coefficients[m.site].float()]]  # fmt: skip
        where = f"{NEURONS_READ}; at block {place.layer} it"
        must_match(torch.stack(found).sum(0), behind, where, NO_NEURONS)
        into[at] -= into[:at].sum(0)


def _write(
    sites: Sites,
    place: Place,
    seen: Capture,
    rules: Rules,
    into: Float[Tensor, "writer pair pos d_model"],
) -> Float[Tensor, "pair pos d_model"]:
    """Fills `into` with what each writer of a place adds to the stream; gives the whole."""
    basis, parts = place.basis, into[: len(place.basis.parts)]

    def check(found: Float[Tensor, "pair pos d_model"]) -> None:
        what, otherwise = (NEURONS_WRITE, NO_NEURONS) if basis.entry else (HEADS, NO_STREAM)
        where = f"{what}; at block {place.layer} it"
        delta, values = seen.delta(basis.behind), seen.own[basis.behind]
        must_match(found, delta, where, otherwise, rounded=values)

    def norm(moved: Float[Tensor, "pair pos d_model"]) -> NormMap:
        check(moved)
        return _norm_map(sites, basis.post, seen, basis.behind, rules)

    if basis.out and basis.parts:
        step = seen.delta(basis.out.site)
        changes(basis, step, norm, parts)
        if not basis.entry and basis.post is None:
            return parts.sum(0)
        if basis.post is None:
            check(basis.together(step, parts))
    whole = seen.delta(basis.component).float()
    if basis.entry:
        into[-1] = whole
        if basis.parts:
            into[-1] -= parts.sum(0)
    return whole


class EdgeSums:
    """Edge scores of a task, summed up capture by capture.

    Raises:
        ValueError: they are to be kept by position, and do not fit into memory.
    """

    def __init__(self, sites: Sites, task: TaskLike, rules: Rules, positions: bool | str) -> None:
        self.sites_needed, self.coefficients_needed = stream_sites(sites), reader_sites(sites)
        self._sites, self._rules, self._positions, self._pairs = sites, rules, positions, len(task)
        self.places = span_places(task.spans) if positions == "spans" else ()
        groups = len(self.places) or (int(task.lengths.max()) if positions else 1)
        size = groups, len(sites.writers), len(sites.readers)
        tokens = min(tokens_at_once(sites, apart=groups > 1), len(task) * int(task.lengths.max()))
        rows, width = len(sites.writers) + _readers_at_once(sites), int(sites.model.cfg.d_model)
        self.work = 4 * (tokens * rows * width + prod(size))
        """Bytes that scoring takes beside what is captured."""
        if positions is True:
            _must_fit(*size, tables=2 if rules.partway else 1)
        self._sums = torch.zeros(size)
        self._starts = torch.zeros(size) if rules.partway else None

    def add(self, _: Int[Tensor, " row"], batch: TaskLike, seen: Capture) -> None:
        """Adds the scores of one capture of some pairs, which have one length."""
        group, share = position_groups(batch, self._positions), seen.share / self._pairs
        tables = [(seen, self._sums)]
        if self._starts is not None:
            tables.append((seen.at_start(), self._starts))
        edge_scores(self._sites, self._rules, group, *tables, share=share)

    @cached_property
    def table(self) -> Float[Tensor, "*pos writer reader"]:
        """The scores, without an axis for positions unless they are kept; nothing is added then."""
        if self._starts is not None:
            # one group at a time: there is no room for a third table
            for start, whole in zip(self._starts, self._sums, strict=True):
                whole.copy_(weight_of_both(start, whole))
            self._starts = None
        return self._sums if self._positions else self._sums[0]

    def scores(
        self, provenance: Provenance, pairs: Pairs, remainder: Mapping[str, float]
    ) -> EdgeScores:
        """The result."""
        pairs = replace(pairs, tokens=self.places or pairs.tokens)
        return EdgeScores(provenance=provenance, pairs=pairs, places=self.places,
                          remainder=remainder, layout=self._sites.layout,
                          edges=self.table)  # fmt: skip


def _must_fit(positions: int, writers: int, readers: int, *, tables: int) -> None:
    need, free = 4 * tables * positions * writers * readers, available(torch.device("cpu"))
    if need > free:
        twice = "" if tables == 1 else f"{tables} x "
        raise ValueError(
            f"edge scores by position must fit into memory; they are {need / 1e9:,.1f} GB ({twice}"
            f"{positions:,} positions x {writers:,} writers x {readers:,} readers), and "
            f"{free / 1e9:,.1f} GB are free; sum them over spans (positions='spans'), leave "
            "`positions` out, or score shorter prompts"
        )
