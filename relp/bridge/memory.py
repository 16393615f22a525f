"""How much runs at once: batches that keep memory near a constant, whatever the model and task."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from relp.bridge.sites import Sites
from relp.protocols import TaskLike

__all__ = [
    "as_fits",
    "available",
    "circuit_runs",
    "pairs_kept",
    "pairs_per_batch",
    "prompts_per_run",
]

EDGE_BYTES = 640 << 20
"""Memory for one batch: the graph of its run, and captured sites."""
NODE_BYTES = 512 << 20
RUN_BYTES = 24 << 20
"""Activations of one batch of changed runs on a CPU, where larger ones were not faster; elsewhere
memory is what the device has, and a batch that does not fit is made smaller."""
DEVICE_BYTES = 4 << 30
PAIR_BYTES = 512 << 20
"""Activations of both runs that are kept for the pairs at work."""
CIRCUIT_BYTES = 256 << 20
"""Memory for the writers' changes of the circuits and pairs that share a run."""


def pairs_per_batch(sites: Sites, task: TaskLike, level: str, names: Sequence[str]) -> int:
    """Pairs in one batch of `attribute`, when the named sites are captured."""
    cfg, length = sites.model.cfg, int(task.lengths.max())
    graph = 40 * int(cfg.d_model) * len(sites.blocks)
    neurons = {b.name(part): b.neurons for b in sites.blocks for part in ("up", "gate", "neurons")}
    if level == "edge":
        captured = 3 * sum(neurons.get(name, int(cfg.d_model)) for name in names)
        return max(1, EDGE_BYTES // (4 * length * (graph + captured)))
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


def available(device: torch.device) -> int:
    """Bytes that can still be had: of a GPU, or of the machine as far as this process may."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return max(0, min(_free_of_machine(), *_left_to_process(), *_left_to_group()))


def _free_of_machine() -> int:
    """What can be used without swapping; what is built in where nothing says so."""
    kilobytes = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if kilobytes is not None:
        return 1024 * kilobytes
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize


def _left_to_process() -> Iterator[int]:
    """What its own limits leave it, as `ulimit -v` sets them."""
    yield sys.maxsize
    used = _fields(Path("/proc/self/status"))
    if used:
        import resource  # not everywhere

        for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            soft, _ = resource.getrlimit(limit)
            if soft != resource.RLIM_INFINITY:
                yield soft - 1024 * used[name]


def _left_to_group() -> Iterator[int]:
    """What containers and batch systems leave it, in either version of Linux' control groups."""
    yield sys.maxsize
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            root, limit, used = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            root, limit, used = (
                "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            )  # fmt: skip
        else:
            continue
        own = Path(root, path.lstrip("/"))
        for folder in (own, *own.parents):
            try:
                most, now = (int((folder / name).read_text()) for name in (limit, used))
            except (OSError, ValueError):  # not there, or "max"
                continue
            # files that were read lie in memory too, until something else needs it
            files = _fields(folder / "memory.stat").get("inactive_file", 0)
            yield most - now + files


def _fields(file: Path) -> dict[str, int]:
    """`name: number` or `name number` in each line; empty if there is no such file."""
    if not file.exists():
        return {}
    words = [line.replace(":", " ").split() for line in file.read_text().splitlines()]
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}
