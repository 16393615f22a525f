"""How much runs at once: batches that keep memory near a constant, whatever the model and task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from relp.bridge.capture import Capture
from relp.bridge.sites import Sites
from relp.protocols import TaskLike
from relp.rulebook import Rules

__all__ = [
    "as_fits",
    "circuit_runs",
    "give_back",
    "in_batches",
    "is_shortage",
    "pairs_kept",
    "prompts_per_run",
]

EDGE_BYTES = 384 << 20
"""Memory for one batch: the graph of its run, captured sites, and the changes of its writers."""
NODE_BYTES = 512 << 20
RUN_BYTES = 24 << 20
"""Activations of one batch of changed runs on a CPU, where larger ones were not faster; elsewhere
memory is what the device has, and a batch that does not fit is made smaller."""
DEVICE_BYTES = 4 << 30
PAIR_BYTES = 512 << 20
"""Activations of both runs that are kept for the pairs at work."""
CIRCUIT_BYTES = 256 << 20
"""Memory for the writers' changes of the circuits and pairs that share a run."""


@dataclass(frozen=True)
class Plan:
    """How a task's pairs are run."""

    pairs: int
    """In one batch."""
    blocks: int | None
    """How many are differentiated at a time; all if None."""
    layers: int
    """How many there are."""


def attribution_plan(
    sites: Sites, task: TaskLike, rules: Rules, level: str, names: Sequence[str]
) -> Plan:
    """How `attribute` runs, when the named sites are captured."""
    return Plan(_pairs_per_batch(sites, task, level, names), FORCED, len(sites.blocks))


FORCED = None


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
            number = 0
            for seen in captured(batch, blocks):
                number += 1
                if number > done:
                    add(index, batch, seen)
                    done = number
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
            parts = list(batch.buckets((len(index) + 1) // 2))[::-1]
            todo += [(index[part], some, done) for part, some in parts]
        else:
            blocks = max(1, (blocks or plan.layers) // 2)
            todo.append((index, batch, done))


def _pairs_per_batch(sites: Sites, task: TaskLike, level: str, names: Sequence[str]) -> int:
    cfg, length = sites.model.cfg, int(task.lengths.max())
    graph = 40 * int(cfg.d_model) * len(sites.blocks)
    neurons = {b.name(part): b.neurons for b in sites.blocks for part in ("up", "gate", "neurons")}
    if level == "edge":
        captured = 3 * sum(neurons.get(name, int(cfg.d_model)) for name in names)
        columns = max(len(b.readers) for b in sites.blocks)
        held = int(cfg.d_model) * (len(sites.writers) + columns) + captured
        return max(1, EDGE_BYTES // (4 * length * (graph + held)))
    held = 3 * sum(neurons.get(name, 0) for name in names)
    return max(1, NODE_BYTES // (4 * length * (graph + held + 3 * int(cfg.d_vocab))))


def prompts_per_run(sites: Sites, task: TaskLike) -> int:
    """Prompts in one forward pass in which something is changed."""
    values = 12 * int(sites.model.cfg.d_model)
    if not task.metric.reads_answer_only:
        values += int(sites.model.cfg.d_vocab)
    memory = RUN_BYTES if sites.device.type == "cpu" else DEVICE_BYTES
    return max(1, memory // (4 * int(task.lengths.max()) * values))


def pairs_kept(sites: Sites, task: TaskLike, *, edges: bool) -> int:
    """Pairs whose activations are kept at a time."""
    values = (20 * len(sites.blocks) + len(sites.writers) * edges) * int(sites.model.cfg.d_model)
    return max(1, PAIR_BYTES // (4 * int(task.lengths.max()) * values))


def circuit_runs(sites: Sites, task: TaskLike) -> int:
    """Runs in one batch: circuits times pairs."""
    cfg = sites.model.cfg
    values = len(sites.layout.writers) * int(cfg.d_model)
    if not task.metric.reads_answer_only:
        values += int(cfg.d_vocab)
    return max(1, CIRCUIT_BYTES // (4 * int(task.lengths.max()) * values))


def as_fits(run: Callable[[int], None], rows: int, *, emptied: Callable[[], None]) -> None:
    """Calls `run` with a number of rows, and again with half of them whenever memory runs out.

    `run` goes on from what is finished; `emptied` drops what is kept for speed alone.

    Raises:
        RuntimeError: memory runs out with a single row.
    """
    alone = False
    while True:
        try:
            return run(rows)
        except RuntimeError as error:
            if alone or not is_shortage(error):
                raise
        # behind the `except`: the error's traceback holds what the run held
        emptied()
        give_back()
        alone, rows = rows == 1, max(1, rows // 2)


def is_shortage(error: Exception) -> bool:
    """Whether memory ran out, of a device or of the machine."""
    from accelerate.utils import memory  # not at the top: it takes a second

    return bool(memory.should_reduce_batch_size(error))


def give_back() -> None:
    """Frees what a failed run held, and what the device keeps for later runs."""
    from accelerate.utils import memory

    memory.clear_device_cache(garbage_collection=True)
