"""How much runs at once: rows of a batch, from what a row takes and how much memory there is.

On a CPU larger batches are no faster from some size on, which is each call's `pace`; elsewhere they
take a share of what the device has left. What a pair takes in `attribute` is counted on single
blocks of the model (`needed`), so that it holds for any architecture, precision and rules; the
other calls hold a few tensors of known shapes. A batch that does not fit after all is made smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from relp.bridge.capture import Capture
from relp.bridge.room import Room, give_back, is_shortage
from relp.bridge.sites import Sites
from relp.protocols import TaskLike

__all__ = [
    "PAIR_BYTES",
    "ROW_BYTES",
    "Need",
    "Plan",
    "attribution_plan",
    "circuit_bytes",
    "circuit_runs",
    "in_batches",
    "pair_bytes",
    "pairs_kept",
    "prompts_per_run",
    "run_bytes",
]


class Call(NamedTuple):
    """How much memory the rows of one batch may take."""

    pace: int
    """Bytes, on a CPU."""
    share: float
    """Of what another device has left."""

    def of(self, room: Room) -> int:
        """In bytes."""
        left = int(self.share * room.left)
        return min(self.pace, left) if room.paced else left


ATTRIBUTION = Call(640 << 20, 0.8)
"""Graph, activations and coefficients of the pairs at work."""
CHANGED = Call(24 << 20, 0.3)
"""Activations of runs in which something is changed."""
KEPT = Call(512 << 20, 0.3)
"""Activations of both runs of the pairs that the changed runs are of."""
CIRCUITS = Call(256 << 20, 0.6)
"""What writers add differently in the circuits and pairs that share a run."""
PAIR_BYTES = KEPT.pace
ROW_BYTES = 1 << 30
"""Up to this, a run of a circuit holds what each writer adds differently; beyond it what modules
hold, of which that follows."""
SHARE = 0.8
"""Of what is left, for one pair of long prompts; the rest is what libraries take."""


# -- attribute -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Bytes that the captures of one pair take, beside the weights."""

    whole: int
    """At most, with the graph of the whole run."""
    block: int
    """With that of one block at a time, all that is captured beside it."""
    away: int
    """The same where what is captured is kept elsewhere, in the memory of the machine."""
    more: int
    """For each further block that is differentiated at the same time, about."""
    kept: int
    """Afterwards."""


@dataclass(frozen=True)
class Plan:
    """How `attribute` runs a task's pairs."""

    pairs: int
    """In one batch."""
    blocks: int | None
    """How many are differentiated at a time; all if None."""
    layers: int
    """How many there are."""
    bytes: int = 0
    """What a batch holds at most, beside the weights; 0 if nobody has looked."""

    @property
    def note(self) -> str:
        """What a bar says of it."""
        said = f"{self.pairs} at a time"
        if self.blocks is not None:
            said += f", {self.blocks} of {self.layers} blocks"
        return f"{said}, {self.bytes / 1e9:.2g} GB" if self.bytes else said


def attribution_plan(
    sites: Sites,
    task: TaskLike,
    needed: Callable[[TaskLike], Need],
    *,
    work: int = 0,
    batch_size: int | None = None,
    room: Room | None = None,
) -> Plan:
    """How `attribute` runs.

    Args:
        needed: what capturing a pair takes; asked only if it matters.
        work: bytes that scoring takes beside what is captured.
        batch_size: pairs in a batch, if somebody has said it.
        room: the memory there is; where the model is, if None.
    """
    layers = len(sites.blocks)
    if room is None:
        room = Room.of(sites.device)
        small = len(task) * _small(sites, task) <= ATTRIBUTION.of(room)
        if small or batch_size is not None:
            return Plan(batch_size or len(task), None, layers)
    need = needed(task.select([int(task.lengths.argmax())]))
    limit = int(SHARE * room.left)
    if need.whole > limit:
        pairs, least = batch_size or 1, need.block if room.paced else need.away
        blocks = min(layers, 1 + max(0, limit - least) // max(1, need.more))
        most, kept = least + (blocks - 1) * need.more, need.kept if room.paced else 0
        return Plan(pairs, blocks, layers, max(pairs * most, pairs * kept + work))
    pairs = max(1, (min(ATTRIBUTION.pace, limit) if room.paced else limit) // need.whole)
    pairs = batch_size or min(len(task), pairs)
    return Plan(pairs, None, layers, max(pairs * need.whole, pairs * need.kept + work))


def _small(sites: Sites, task: TaskLike) -> int:
    """More bytes than a pair takes under any rules, in the models that we know."""
    cfg, length = sites.model.cfg, int(task.lengths.max())
    width = max((b.neurons for b in sites.blocks), default=0)
    block = 30 * int(cfg.d_model) + 12 * width + 8 * length * int(cfg.n_heads)
    read = 1 if task.metric.reads_answer_only else length
    return 4 * (length * len(sites.blocks) * block + 6 * read * int(cfg.d_vocab))


def in_batches(
    task: TaskLike,
    plan: Plan,
    captured: Callable[[TaskLike, int | None], Iterator[Capture]],
    add: Callable[[Int[Tensor, " row"], TaskLike, Capture], None],
) -> Iterator[int]:
    """Adds the captures of all pairs; gives how many pairs each finished batch has had.

    A batch for which memory runs out is run again in halves, and a pair by itself with fewer blocks
    at a time. What is added stays added, and is not added twice.

    Raises:
        RuntimeError: memory runs out with one block of one pair.
    """
    todo = [(index, batch, 0) for index, batch in task.buckets(plan.pairs)][::-1]
    blocks = plan.blocks
    while todo:
        index, batch, done = todo.pop()
        try:
            for seen in _after(done, captured(batch, blocks)):
                add(index, batch, seen)
                done += 1
                del seen  # or the next run would have this one beside it
            yield len(index)
            continue
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            if len(index) == 1 and blocks == 1:
                raise RuntimeError(
                    "memory must hold the graph of one block of one pair, and what is captured of "
                    f"the pair; it ran out at {int(batch.lengths[0]):,} tokens; give shorter "
                    "prompts, fewer components, or a device with more memory"
                ) from error
        give_back()  # behind the `except`: the error's traceback holds what the run held
        if len(index) > 1:
            halves = list(batch.buckets((len(index) + 1) // 2))[::-1]
            todo += [(index[half], some, done) for half, some in halves]
        else:
            blocks = max(1, (blocks or plan.layers) // 2)
            todo.append((index, batch, done))


def _after(done: int, captures: Iterator[Capture]) -> Iterator[Capture]:
    """Without those that are done."""
    for _ in range(done):
        next(captures)
    yield from captures


# -- exact effects and circuits --------------------------------------------------------------------


def prompts_per_run(sites: Sites, task: TaskLike, room: Room | None = None) -> int:
    """Prompts in one forward pass in which something is changed."""
    room = room or Room.of(sites.device)
    return max(1, CHANGED.of(room) // run_bytes(sites, task))


def pairs_kept(sites: Sites, task: TaskLike, room: Room | None = None, *, edges: bool) -> int:
    """Pairs whose activations are kept at a time."""
    room = room or Room.of(sites.device)
    return max(1, KEPT.of(room) // pair_bytes(sites, task, edges=edges))


def circuit_runs(sites: Sites, task: TaskLike, room: Room | None = None) -> int:
    """Runs in one batch: circuits times pairs."""
    room = room or Room.of(sites.device)
    return max(1, CIRCUITS.of(room) // circuit_bytes(sites, task))


def circuit_bytes(sites: Sites, task: TaskLike) -> int:
    """What one circuit on one pair holds: what is added differently, and the layer at work."""
    stream = int(task.lengths.max()) * int(sites.model.cfg.d_model)
    held = 4 * len(sites.layout.writers) * stream
    if held > ROW_BYTES:  # two modules of each block, and the run that theirs differ from
        held = len(sites.blocks) * stream * (8 + 4 * _itemsize(sites))
    return held + run_bytes(sites, task)


def pair_bytes(sites: Sites, task: TaskLike, *, edges: bool) -> int:
    """What is kept of one pair for exact effects: activations of both runs, keys and values."""
    values = 11 * len(sites.blocks) * _itemsize(sites) + 4 * len(sites.writers) * edges
    return int(task.lengths.max()) * int(sites.model.cfg.d_model) * values


def run_bytes(sites: Sites, task: TaskLike) -> int:
    """What the layer at work holds of one prompt, and the logits."""
    cfg, length = sites.model.cfg, int(task.lengths.max())
    patterns = length * int(cfg.n_heads)
    read = 1 if task.metric.reads_answer_only else length
    logits = 4 * read * int(cfg.d_vocab)
    return length * (12 * int(cfg.d_model) + patterns) * _itemsize(sites) + logits


def _itemsize(sites: Sites) -> int:
    """Bytes of a number of the model."""
    return int(next(p for p in sites.model.parameters() if p.is_floating_point()).element_size())
