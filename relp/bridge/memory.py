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

import torch
from jaxtyping import Int
from torch import Tensor

from relp.bridge.capture import Capture
from relp.bridge.room import available, give_back, is_shortage
from relp.bridge.sites import Sites
from relp.protocols import TaskLike

__all__ = [
    "PAIR_BYTES",
    "Need",
    "Plan",
    "attribution_plan",
    "circuit_runs",
    "in_batches",
    "pairs_kept",
    "prompts_per_run",
]


class Call(NamedTuple):
    """How much memory the rows of one batch may take."""

    pace: int
    """Bytes, on a CPU."""
    share: float
    """Of what another device has left."""

    def room(self, device: torch.device) -> int:
        """In bytes."""
        left = int(self.share * available(device))
        return min(self.pace, left) if device.type == "cpu" else left


ATTRIBUTION = Call(512 << 20, 0.8)
"""Graph, activations and coefficients of the pairs at work."""
CHANGED = Call(24 << 20, 0.3)
"""Activations of runs in which something is changed."""
KEPT = Call(512 << 20, 0.3)
"""Activations of both runs of the pairs that the changed runs are of."""
CIRCUITS = Call(256 << 20, 0.6)
"""What writers add differently in the circuits and pairs that share a run."""
PAIR_BYTES = KEPT.pace
SHARE = 0.8
"""Of what is left, for one pair of long prompts; the rest is what libraries take."""


# -- attribute -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Bytes that the captures of one pair take, beside the weights."""

    whole: int
    """At most, with the graph of the whole run."""
    block: int
    """With that of one block at a time."""
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
    need: Need | None = None
    """What one pair takes; None if all together are small."""

    @property
    def bytes(self) -> int:
        """What a batch holds at most, beside the weights; 0 if nobody has looked."""
        if self.need is None:
            return 0
        one = self.need
        if self.blocks is None:
            return self.pairs * one.whole
        return self.pairs * (one.block + (self.blocks - 1) * one.more)

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
    batch_size: int | None = None,
    device: torch.device | None = None,
    left: int | None = None,
) -> Plan:
    """How `attribute` runs.

    Args:
        needed: what capturing a pair takes; asked only if it matters.
        batch_size: pairs in a batch, if somebody has said it.
        device: where, if not where the model is; `left`: bytes that are available there.
    """
    device, layers = device or sites.device, len(sites.blocks)
    if left is None:
        if len(task) * _small(sites, task) <= ATTRIBUTION.room(device) or batch_size is not None:
            return Plan(batch_size or len(task), None, layers)
        left = available(device)
    longest = task.select([int(task.lengths.argmax())])
    need = needed(longest)
    limit = int(SHARE * left)
    if need.whole > limit:
        blocks = 1 + max(0, limit - need.block) // max(1, need.more)
        return Plan(batch_size or 1, min(blocks, layers), layers, need)
    room = min(ATTRIBUTION.pace, limit) if device.type == "cpu" else limit
    pairs = min(len(task), max(1, room // need.whole))
    return Plan(batch_size or pairs, None, layers, need)


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


def prompts_per_run(sites: Sites, task: TaskLike) -> int:
    """Prompts in one forward pass in which something is changed."""
    return max(1, CHANGED.room(sites.device) // _run_bytes(sites, task))


def pairs_kept(sites: Sites, task: TaskLike, *, edges: bool) -> int:
    """Pairs whose activations are kept at a time."""
    values = 20 * len(sites.blocks) * _itemsize(sites) + 4 * len(sites.writers) * edges
    pair = int(task.lengths.max()) * int(sites.model.cfg.d_model) * values
    return max(1, KEPT.room(sites.device) // pair)


def circuit_runs(sites: Sites, task: TaskLike) -> int:
    """Runs in one batch: circuits times pairs."""
    changes = 4 * len(sites.layout.writers) * int(sites.model.cfg.d_model)
    row = int(task.lengths.max()) * changes + _run_bytes(sites, task)
    return max(1, CIRCUITS.room(sites.device) // row)


def _run_bytes(sites: Sites, task: TaskLike) -> int:
    """What the layer at work holds of one prompt, and the logits."""
    cfg, length = sites.model.cfg, int(task.lengths.max())
    patterns = length * int(cfg.n_heads)
    read = 1 if task.metric.reads_answer_only else length
    logits = 4 * read * int(cfg.d_vocab)
    return length * (12 * int(cfg.d_model) + patterns) * _itemsize(sites) + logits


def _itemsize(sites: Sites) -> int:
    """Bytes of a number of the model."""
    return int(next(p for p in sites.model.parameters() if p.is_floating_point()).element_size())
