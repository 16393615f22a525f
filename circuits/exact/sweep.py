"""What a sweep of exact effects has measured so far, and the file that keeps it.

The file is a `.safetensors` one: the numbers of `Sweep`, and in its header what makes a sweep the
same sweep. It is whole whenever the work is interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from relp import written_whole
from relp.bridge import Sites, fingerprint, versions

__all__ = ["EVERYWHERE", "Cell", "Sweep", "identity"]

SECONDS = 5.0
"""How much work an interrupted sweep may lose."""
EVERYWHERE = -1
"""In the place of a position: all of them."""


class Cell(NamedTuple):
    """One thing to change in one run."""

    component: str
    """A component's name; a writer's if there is a reader."""
    reader: str = ""
    """Who hears the change; everything after the component if empty."""
    pos: int = EVERYWHERE
    """At which position; all of them if -1."""


def identity(
    sites: Sites, task: Any, cells: Sequence[Cell], direction: str, ablation: str
) -> dict[str, str]:
    """What makes a sweep the same sweep."""
    dtype, weights = fingerprint(sites.model)
    prompts = (task.clean, task.corrupt, task.answers, task.foils, task.spans["end"])
    return {
        "model": sites.model_name,
        "task": task.name,
        "metric": task.metric.name,
        "direction": direction,
        "ablation": ablation,
        "prompts": _digest(str([tensor.tolist() for tensor in prompts])),
        "cells": _digest(json.dumps(cells)),
        "dtype": dtype,
        "weights": weights,
        "versions": versions(),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Sweep:
    """What is measured of a list of cells; NaN is what is not yet."""

    effects: Float[Tensor, "pair cell"]
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    resolution: Float[Tensor, " pair"]
    """Effects up to this are rounding: the last place of the pair's larger metric, or by how much
    runs differ in which nothing is changed."""

    @classmethod
    def begun(cls, path: Path | None, labels: Mapping[str, str], pairs: int, cells: int) -> Sweep:
        """The sweep that the file holds, or a new one.

        Raises:
            ValueError: the file holds something else.
        """
        if path is None or not path.exists():
            clean, corrupt = torch.full((2, pairs), torch.nan)
            effects = torch.full((pairs, cells), torch.nan)
            return cls(effects, clean, corrupt, resolution=torch.zeros(pairs))
        try:
            with safe_open(str(path), framework="pt") as file:
                found = json.loads((file.metadata() or {})["relp.sweep"])
                sweep = cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"`resume` must be a file that an interrupted sweep wrote; {str(path)!r} is not "
                f"({error}); choose another name"
            ) from error
        if differing := [name for name in labels if found.get(name) != labels[name]]:
            was, now = found.get(differing[0]), labels[differing[0]]
            raise ValueError(
                f"`resume` must be the file of the same sweep; {str(path)!r} differs in "
                f"{differing[0]}: {was!r}, now {now!r}; choose another name, or delete it"
            )
        return sweep

    @contextmanager
    def kept(self, path: Path | None, labels: Mapping[str, str]) -> Iterator[Callable[[], None]]:
        """Gives a function to call after each batch, which saves now and then; so does the end."""

        def save() -> None:
            assert path is not None
            with written_whole(path) as temporary:
                temporary.write_bytes(to_bytes(vars(self), {"relp.sweep": json.dumps(labels)}))

        if path is None:
            yield lambda: None
            return
        save()  # a folder that cannot be written is noticed before the work
        last = monotonic()

        def now_and_then() -> None:
            nonlocal last
            if monotonic() - last > SECONDS:
                save()
                last = monotonic()

        try:
            yield now_and_then
        finally:
            save()

    def interrupted(self, path: Path | None) -> str:
        """What to say to whom has interrupted it: what is kept, and how to go on."""
        if path is None:
            return (
                "interrupted: nothing is kept; give patch(..., resume='sweep.safetensors') to keep "
                "what is finished and to go on from there"
            )
        done, all_ = int((~self.effects.isnan()).sum()), self.effects.numel()
        return (
            f"interrupted: {done:,} of {all_:,} effects are kept in {str(path)!r}; make the same "
            "call again, with this `resume`, to go on"
        )

    def note(
        self,
        side: str,
        index: Int[Tensor, " row"],
        found: Float[Tensor, " row"],
        *,
        eps: float,
        noise: float,
    ) -> None:
        """Keeps the metric of some pairs' `clean` or `corrupt` run, and how fine it is.

        `eps`: the precision of the model; `noise`: by how much runs differ that are not changed.

        Raises:
            ValueError: the sweep goes on, and the metric was another.
        """
        metric: Tensor = getattr(self, side)
        now = found.float().cpu()
        # batches of another size, as after memory ran out, round differently
        tolerance = max(1e-3, 8 * eps) * (1 + now.abs().max())
        if bool(((metric[index] - now).abs() > tolerance).any()):
            raise ValueError(
                "`resume` must be the file of a sweep of this very model; the metric of its runs "
                "is another now; choose another name, or load the weights of then"
            )
        metric[index] = now
        finest = torch.maximum(self.resolution[index], eps * now.abs())
        self.resolution[index] = finest.clamp(min=noise)
