"""Which tasks a model can do: how often it prefers the answer to the foil.

python -m tasks.able ioi-gpt2 ioi-llama smollm2-135m    # measures them anew, and records it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

from tasks.registry import TASKS, builder

__all__ = ["PAIRS", "measured", "recorded"]

PAIRS = 32
"""Pairs of each task, those of seed 0."""
RECORD = Path(__file__).with_suffix(".json")


def recorded() -> dict[str, dict[str, float]]:
    """For each model that was measured, the share of each task; NaN where words are lacking.

    >>> from tasks.able import recorded
    >>> recorded()["ioi-gpt2"]["ioi"]
    1.0
    """
    kept: dict[str, dict[str, float | None]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return {model: {task: _number(of.get(task)) for task in TASKS} for model, of in kept.items()}


def measured(model: Any, *, pairs: int = PAIRS, seed: int = 0) -> dict[str, float]:
    """The share of each task's clean prompts on which a model prefers the answer.

    >>> from tasks.able import measured
    >>> measured(model, pairs=4)["ioi"]
    1.0

    NaN where the model's tokenizer has not the task's words, each as one token.

    Raises:
        ValueError: the model is in train mode.
    """
    shares = {}
    for name in TASKS:
        try:
            task = builder(name)(model.tokenizer, pairs=pairs, seed=seed)
        except ValueError:
            shares[name] = nan
            continue
        shares[name] = float(task.preferred(model).float().mean())
    return shares


def write(shares: Mapping[str, Mapping[str, float]]) -> None:
    """Records what was measured of some models beside what is known of others."""
    kept = recorded() if RECORD.exists() else {}
    kept |= {model: dict(of) for model, of in shares.items()}
    rows = {
        model: {task: None if share != share else share for task, share in of.items()}
        for model, of in kept.items()
    }
    RECORD.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _number(share: float | None) -> float:
    return nan if share is None else share


if __name__ == "__main__":
    from tasks import zoo

    for asked in sys.argv[1:]:
        write({asked: measured(zoo.load(asked))})
