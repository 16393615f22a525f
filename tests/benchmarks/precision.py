"""What half precision of the weights changes: scores, effects and circuits beside float32's.

`python tests/benchmarks/precision.py` prints the table of docs/recipes/large.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from circuits import faithfulness, patch, top
from relp import PRESETS, attribute
from tasks import ioi, zoo

RULES = ("GRADIENT", "RELP", "DEEPLIFT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--edges", type=int, default=200)
    asked = parser.parse_args()
    begun = perf_counter()
    full = dict(measured(asked, "float32", circuit=None))
    rows: dict[str, list[str]] = {name: [] for name in full if name != "circuit"}
    for dtype in ("bfloat16", "float16"):
        for name, value in measured(asked, dtype, circuit=full["circuit"]):
            if name in rows:
                rows[name].append(beside(value, full[name]))
                print(f"{perf_counter() - begun:.0f} s: {dtype}, {name}", file=sys.stderr)
    print("| | bfloat16 | float16 |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row)} |")


def measured(asked: Any, dtype: str, *, circuit: Any) -> Iterator[tuple[str, Any]]:
    """Each number of one precision; effects and faithfulness of what float32 has chosen."""
    model = zoo.load(asked.model, dtype=dtype)
    task = ioi(model.tokenizer, pairs=asked.pairs, seed=0)
    chosen, scores = circuit or (None, None), {}
    for rules in RULES:
        scores[rules] = attribute(model, task, rules=PRESETS[rules], progress=False)
        yield f"node scores, {rules}", scores[rules].nodes
        edges = attribute(model, task, rules=PRESETS[rules], level="edge", progress=False)
        yield f"edge scores, {rules}", edges.edges
        if rules == "RELP" and circuit is None:
            chosen = (top(edges, edges=asked.edges), strongest(scores[rules], asked.parts))
    yield "clean metric", float(scores["RELP"].clean.mean())
    yield "corrupt metric", float(scores["RELP"].corrupt.mean())
    graph, parts = chosen
    effect = patch(model, task.select([0, 1]), components=parts, progress=False)
    yield f"effects of {len(parts)} heads and MLPs, at each position", effect.nodes
    yield f"faithfulness of {asked.edges} edges", faithfulness(model, task, graph)
    yield "circuit", chosen


def strongest(scores: Any, count: int) -> list[str]:
    """The heads and MLPs with the largest scores."""
    frame = scores.top(50 * count)
    return list(dict.fromkeys(frame[frame.kind.isin(["head", "mlp"])].component))[:count]


def beside(found: Any, expected: Any) -> str:
    """Pearson's r, and the length of the difference over that of float32's; or both numbers."""
    if not isinstance(expected, Tensor):
        return f"{found:.4f} for {expected:.4f}"
    there = ~(found.isnan() | expected.isnan())
    x, y = found[there].double(), expected[there].double()
    r = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    return f"r {r:.5f}, {float((x - y).norm() / y.norm()):.1%}"


if __name__ == "__main__":
    main()
