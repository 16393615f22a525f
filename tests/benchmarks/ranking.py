"""What it takes to choose and show circuits of a large model: `python tests/benchmarks/ranking.py`.

Synthetic edge scores at the shape of Llama-3.1-8B: 32 layers of 32 heads, of 8 key/value heads, and
805,681 edges. Seconds of CPU time on one thread, the least of three calls, each with a model that
was not seen before.
"""

from collections.abc import Callable
from time import process_time

import torch

from circuits import draw, greedy, threshold, top
from relp import Direction, EdgeScores, Layout, Pairs, Provenance

torch.set_num_threads(1)

LAYERS, HEADS, KV_HEADS, REPEATS = 32, 32, 8, 3


def scores(seed: int) -> EdgeScores:
    """Random scores; each call has a table of its own."""
    writers, readers = ["embed"], []
    for layer in range(LAYERS):
        heads, mlp = [f"L{layer}H{h}" for h in range(HEADS)], f"L{layer}.mlp"
        writers += [*heads, mlp]
        readers += [f"{head}.q" for head in heads]
        readers += [f"L{layer}KV{h}.{slot}" for slot in "kv" for h in range(KV_HEADS)]
        readers.append(f"{mlp}.in")
    readers.append("logits.in")
    shape = len(writers), len(readers)
    return EdgeScores(
        provenance=Provenance(model="8b", task="synthetic", rules="RELP",
                              direction=Direction.DENOISE, metric="logit difference"),
        pairs=Pairs(clean=torch.ones(1), corrupt=torch.zeros(1), lengths=torch.ones(1).long()),
        layout=Layout.of(tuple(writers), tuple(readers), False),
        edges=torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3,
    )  # fmt: skip


def main() -> None:
    """Prints the table."""
    calls: dict[str, Callable[[EdgeScores], object]] = {
        "top(scores, edges=200)": lambda s: top(s, edges=200),
        "draw(top(scores, edges=200))": lambda s: draw(top(s, edges=200)),
        "threshold(scores, 100.0)": lambda s: threshold(s, 100.0),
        "greedy(scores, edges=200)": lambda s: greedy(s, edges=200),
        "notebook display of scores": lambda s: s._repr_html_(),
        "scores.top(10)": lambda s: s.top(10),
        "scores.to_dataframe()": lambda s: s.to_dataframe(),
    }
    print(f"{int(scores(0).layout.exists.sum()):,} edges")
    for name, call in calls.items():
        times = []
        for seed in range(REPEATS):
            given = scores(seed)
            Layout.of.cache_clear()  # a model not seen before
            start = process_time()
            call(given)
            times.append(process_time() - start)
        print(f"{name:<30} {min(times):6.2f} s")


if __name__ == "__main__":
    main()
