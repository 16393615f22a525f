"""Edge scores of one long prompt of an 8B model's circuit graph, in a process of limited memory.

python tests/benchmarks/long_prompt.py                            # 2,048 tokens in 8 GB
python tests/benchmarks/long_prompt.py --tokens 512 --gb 1.2
python tests/benchmarks/long_prompt.py --heap

The blocks, heads and edges are those of Llama-3.1-8B (32 x 32, grouped by 8; 805,681 edges) at
width 256, so that a CPU gets through. The limit (RLIMIT_DATA) is set on what the process may hold
beside what it holds with the weights: with more it fails. At most: how far its resident memory
rises, to which pages of libraries count that the limit does not. Large tensors are mapped one by
one, as with MALLOC_MMAP_THRESHOLD_=262144 in the environment: in glibc's heap, freed pieces that
are too small for the next tensor stay with the process. `--heap` shows what that takes.
"""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from time import process_time

import torch
import typer
from gpu import Shape, llama
from growth import held

from relp import PRESETS, attribute, plan

M_MMAP_THRESHOLD = -3  # malloc.h
MODEL = Shape("8B in small", llama(256, 896, 32, 32, 8, 2048, tied=True), "ioi-llama")


def main(tokens: int = 2048, gb: float = 8.0, rules: str = "relp", whole: bool = False,
         heap: bool = False) -> None:  # fmt: skip
    """Prints the plan, what was held, the time, and how far nodes and edges agree.

    `whole`: also without the limit, and how far the two results are apart; `heap`: as glibc does it
    by itself.
    """
    torch.set_num_threads(1)
    if not heap:
        assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)
    model, task = MODEL.bridge(MODEL.plain("cpu"), "cpu"), MODEL.task(1, tokens)
    chosen = PRESETS[rules.upper()]
    attribute(model, MODEL.task(1, 4), rules=chosen, level="edge")  # what comes with a first call
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is there now
    before, limit = held("VmRSS"), held("VmData") + int(gb * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    how = plan(model, task, rules=chosen, level="edge")
    print(f"{tokens:,} tokens, {gb:g} GB beside the weights, planned: {how.note}", flush=True)
    begin = process_time()
    scores = attribute(model, task, rules=chosen, level="edge")
    seconds = process_time() - begin
    peak = (held("VmHWM") - before) / 1e9
    exists = scores.layout.exists
    print(f"{int(exists.sum()):,} edges of {chosen.name}: {peak:.2f} GB at most, {seconds:.0f} s")
    assert bool(scores.edges.isfinite().all())
    if whole:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
        expected = attribute(model, task, rules=chosen, level="edge").edges
        apart = float((scores.edges - expected).norm() / expected.norm())
        print(f"apart from those of one graph of the whole run by {apart:.0e} of their size")
        assert apart < 1e-5, apart


if __name__ == "__main__":
    typer.run(main)
