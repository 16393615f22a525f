"""Trying what a feature does: setting its value in every run of a model, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from relp import Component, ModelLike
from relp.bridge import Edit, Features, Sites, divisions, editing

__all__ = ["steered"]


@contextmanager
def steered(
    model: ModelLike, values: Mapping[str, float], *, features: Mapping[str, Any]
) -> Iterator[None]:
    """Runs inside have features at these values, at every position; afterwards all is as before.

    >>> with steered(model, {"L1.mlp/f7": 4.0, "L1.mlp/f9": 0.0}, features=dictionaries):
    ...     logits = model(task.clean)

    What the features leave over, and all others, stay as they are: the site changes by (value -
    its own value) times the feature's direction. 0 ablates a feature. Values are in the units of
    the site, those that `Dictionary.encode` gives. Also generation, token by token, is steered;
    runs of other threads are not.

    Args:
        model: a `TransformerBridge` in eval mode.
        values: by name of a feature.
        features: the dictionaries by site, as for `attribute`.

    Raises:
        ValueError: a name is not that of a feature of these dictionaries, or a value is not finite.
        RuntimeError: at the end, if the model was not run inside.
    """
    for name, value in values.items():
        if Component.parse(name).kind != "feature" or not torch.isfinite(torch.tensor(value)):
            raise ValueError(
                "`values` must be finite numbers by names of features, as {'L3.mlp/f1021': 4.0}; "
                f"got {name!r}: {value!r}"
            )
    if not values:
        raise ValueError("`values` must name one feature or more; got none")
    sites = Sites.of(model)
    chosen = divisions(sites, features, values)
    running: dict[str, Tensor] = {}

    def see(site: str, value: Tensor) -> Tensor:
        running[site] = value
        return value

    edits: dict[str, Edit] = {f.reads: partial(see, f.reads) for f in chosen if f.reads != f.site}
    for f in chosen:
        numbers = torch.tensor([values[f.name(n)] for n in f.kept])
        edits[f.site] = partial(_set, f, running, numbers)
    with editing(sites, edits):
        yield


def _set(features: Features, running: Mapping[str, Tensor], values: Tensor, held: Tensor) -> Tensor:
    """What a site holds with other values of some features."""
    numbers = torch.tensor(features.kept, dtype=torch.long)
    own = features.values({**running, features.site: held}, numbers)
    change = (values.to(own) - own) @ features.directions(numbers).to(own)
    return (held + change.to(held.device)).to(held.dtype)
