"""What a call costs: its seconds, and those of the least that any method of two runs could take."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from relp import ModelLike, TaskLike
from relp.bridge import Sites

__all__ = ["floor", "seconds"]

SHORT = 2.0
"""Seconds below which a call is made again, and the faster one counts."""
AGAIN = 3


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and its seconds."""
    begun = perf_counter()
    found = work()
    took = perf_counter() - begun
    for _ in range(AGAIN - 1):
        if took > SHORT:
            break
        begun = perf_counter()
        work()
        took = min(took, perf_counter() - begun)
    return found, took


def floor(model: ModelLike, task: TaskLike) -> float:
    """Seconds of two forward passes of the transformers model and one backward, on all pairs.

    Nothing of ours or of TransformerLens runs, and no gradients of parameters.
    """
    inner = model.original_model
    needed = [p for p in inner.parameters() if p.requires_grad]
    for p in needed:
        p.requires_grad_(False)
    try:
        device = Sites.of(model).device
        return seconds(lambda: _two_runs(inner, task, device))[1]
    finally:
        for p in needed:
            p.requires_grad_(True)


def _two_runs(inner: Any, task: TaskLike, device: torch.device) -> None:
    embed = inner.get_input_embeddings()
    for _, batch in task.buckets():
        with torch.no_grad():
            inner(batch.clean.to(device))
        with torch.enable_grad():
            x = embed(batch.corrupt.to(device)).detach().requires_grad_()
            torch.autograd.grad(batch.metric(inner(inputs_embeds=x).logits).sum(), x)
