"""What a dictionary is worth: how much it explains, with how many features, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tasks.zoo.dictionaries.autoencoders import reconstructed, values
from tasks.zoo.dictionaries.places import replacing

if TYPE_CHECKING:
    from tasks.task import Task

__all__ = ["Quality", "measured", "survives"]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one dictionary, on texts that it was not trained on.

    >>> from tasks.zoo.dictionaries.quality import Quality
    >>> Quality(explained=0.97, active=15.8, dead=0.0, kept={"ioi": 0.98}, without={}).line()
    'explained 0.970, L0  15.8, dead 0.000, ioi 0.98'
    """

    explained: float
    """Share of the variance of the vectors (all but the first position's, which never varies)."""
    active: float
    """Features that are on for a vector, on average (L0)."""
    dead: float
    """Share of the features that are never on."""
    kept: Mapping[str, float]
    """By task, its metric when the reconstruction stands at the site, over that of the model."""
    without: Mapping[str, float]
    """The same with the vectors' mean at the site: what is left without any feature."""

    def line(self) -> str:
        """For people."""
        tasks = [
            f"{name} {share:.2f}"
            + (f" (mean {self.without[name]:.2f})" if name in self.without else "")
            for name, share in self.kept.items()
        ]
        shares = f"explained {self.explained:.3f}, L0 {self.active:5.1f}, dead {self.dead:.3f}"
        return ", ".join([shares, *tasks])


@torch.no_grad()
def measured(
    model: Any,
    site: str,
    weights: dict[str, Tensor],
    x: Float[Tensor, "vector d_model"],
    tasks: Mapping[str, Task],
) -> Quality:
    """Judges the weights of a file.

    Args:
        model: the bridge that it is a dictionary of.
        site: where.
        weights: what the file holds.
        x: what the site holds in texts that were not trained on, but for first positions.
        tasks: which the model can do.
    """
    found = values(weights, x)
    error = (x - reconstructed(weights, x)).square().sum(dtype=torch.float64)
    mean = x.mean(0)
    total = (x - mean).square().sum(dtype=torch.float64)
    kept = {n: survives(model, t, site, lambda v: reconstructed(weights, v)) for n, t in
            tasks.items()}  # fmt: skip
    without = {n: survives(model, t, site, mean.expand_as) for n, t in tasks.items()}
    return Quality(
        explained=1 - float(error / total),
        active=float((found > 0).sum(1).float().mean()),
        dead=float((~(found > 0).any(0)).float().mean()),
        kept=kept,
        without=without,
    )


@torch.no_grad()
def survives(model: Any, task: Task, site: str, change: Callable[[Tensor], Tensor]) -> float:
    """The mean metric of the clean prompts with a site changed, over that of the model as it is."""
    own = changed = 0.0
    hooks = replacing(site, model.cfg.n_layers, change)
    for _, bucket in task.buckets():
        own += float(bucket.metric(model(bucket.clean)).sum())
        changed += float(bucket.metric(model.run_with_hooks(bucket.clean, fwd_hooks=hooks)).sum())
    return changed / own
