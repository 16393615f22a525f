"""`relp plan`: the memory and the runs of a command, known before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import typer

from circuits.cli.options import Json, Model
from circuits.cli.screen import answering, print_table, say

__all__ = ["plan"]

PLANNED = ("discover", "compare", "patch", "verify")
"""The commands whose needs are known beforehand."""
GB = 1e9


class Row(NamedTuple):
    """One call of a command."""

    call: str
    batches: str
    runs: float
    """Passes of one prompt through the whole model; a backward counts as one."""
    bytes: int
    """At most, beside the weights."""


def plan(
    command: Annotated[str, typer.Argument(help=f"One of {', '.join(PLANNED)}.")] = "discover",
    model: Model = "ioi-gpt2",
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of prompts.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 16,
    rules: Annotated[str, typer.Option(help="The rules of the scores.")] = "RELP",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    memory: Annotated[
        float | None,
        typer.Option(min=0.1, help="GB that there are, for the weights too; of this machine if "
                     "not given."),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="They are those of a GPU.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Say what a command would take, in memory and runs, without loading weights.

    MODEL may also be a config.json. Parts of the model are run on tensors that have shapes and no
    numbers, and what is alive is counted.
    """
    with answering(as_json) as answer:
        if command not in PLANNED:
            raise ValueError(
                f"the command must be one of {', '.join(PLANNED)}; got {command!r}; choose one"
            )
        from relp import preset

        chosen = preset(rules)
        from circuits.cli.screen import records
        from tasks import Task
        from tasks.zoo.outline import outline

        bridge = outline(model, dtype=dtype)
        prompts = _random(Task, pairs, tokens, int(bridge.cfg.d_vocab))
        weights = _weights(bridge)
        room = _room(weights, memory, gpu=gpu)
        rows = _rows(command, bridge, prompts, chosen, room)
        most = max(row.bytes for row in rows)
        _tell(model, dtype, prompts, weights, rows, most, room)
        import pandas as pd

        answer |= {"weights": weights, "calls": records(pd.DataFrame(rows)), "most": most}


def _random(task: Any, pairs: int, tokens: int, vocabulary: int) -> Any:
    """Prompts that have a length and no meaning."""
    import torch

    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, shape, generator=draw)

    return task.from_tokens(some(pairs, tokens), some(pairs, tokens), some(pairs), some(pairs))


def _weights(bridge: Any) -> int:
    return sum({p.untyped_storage()._cdata: p.nbytes for p in bridge.parameters()}.values())


def _room(weights: int, memory: float | None, *, gpu: bool) -> Any:
    """What is left beside the weights.

    Raises:
        ValueError: nothing is.
    """
    import torch

    from relp.bridge import Room

    there = Room.of(torch.device("cpu")).left if memory is None else int(memory * GB)
    if there <= weights:
        raise ValueError(
            f"the memory must hold the weights, {weights / GB:.1f} GB; there are {there / GB:.1f} "
            "GB; give --memory of a larger device, --dtype bfloat16, or a device map that spreads "
            "them"
        )
    return Room(there - weights, paced=not gpu)


def _rows(command: str, bridge: Any, prompts: Any, rules: Any, room: Any) -> list[Row]:
    """The calls of a command."""
    from relp.bridge import Sites

    sites = Sites.of(bridge)
    found = []
    if command != "patch":
        found += [_attribution(bridge, prompts, rules, "node", room)]
    if command == "discover":
        found += [_attribution(bridge, prompts, rules, "edge", room)]
    found += [_exact(sites, prompts, room, some=command != "patch")]
    if command == "discover":
        found += [_circuit(sites, prompts, room)]
    return found


def _attribution(bridge: Any, prompts: Any, rules: Any, level: str, room: Any) -> Row:
    from relp import plan

    how = plan(bridge, prompts, rules=rules, level=level, room=room)
    extra = 0 if how.blocks is None else 1 + rules.needs_reference
    runs = len(prompts) * (3 + rules.partway + extra)
    return Row(f"{level} scores, {rules.name}", how.note.rpartition(", ")[0], runs, how.bytes)


def _exact(sites: Any, prompts: Any, room: Any, *, some: bool) -> Row:
    """Exact effects of nodes by position: of all, or of a sample where it is large."""
    from circuits.cli.cases import LARGE
    from circuits.exact.verify import BUDGET
    from relp.bridge import pair_bytes, pairs_kept, prompts_per_run, run_bytes

    length = int(prompts.lengths.max())
    cells = len(sites.components) * length
    large = sum(p.numel() for p in sites.model.parameters()) >= LARGE
    if some and large and cells > BUDGET:
        cells = BUDGET
    rows = prompts_per_run(sites, prompts, room)
    kept = min(len(prompts), rows, pairs_kept(sites, prompts, room, edges=False))
    held = kept * pair_bytes(sites, prompts, edges=False) + rows * run_bytes(sites, prompts)
    # what changes runs the blocks and the positions behind it: a quarter of a run on average
    return Row(f"exact effects of {cells:,} cells", f"{rows} runs at a time",
               len(prompts) * cells / 4, held)  # fmt: skip


def _circuit(sites: Any, prompts: Any, room: Any) -> Row:
    from relp.bridge import circuit_bytes, circuit_runs

    rows = min(circuit_runs(sites, prompts, room), len(prompts))
    return Row("faithfulness of a circuit", f"{rows} at a time", 4 * len(prompts),
               rows * circuit_bytes(sites, prompts))  # fmt: skip


def _tell(
    model: str, dtype: str, prompts: Any, weights: int, rows: list[Row], most: int, room: Any
) -> None:
    pairs, tokens = prompts.clean.shape
    print_table(
        f"{model} in {dtype}, {pairs} pairs of {tokens:,} tokens",
        ["call", "in batches", "runs", "GB beside the weights"],
        [[r.call, r.batches, f"{r.runs:,.0f}", f"{r.bytes / GB:.2f}"] for r in rows],
    )
    say(
        f"weights {weights / GB:.2f} GB, at most {most / GB:.2f} GB beside them; "
        f"{room.left / GB:.1f} GB are there. Runs: passes of one prompt through the whole model"
    )
