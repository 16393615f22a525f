"""Planted circuits: small transformers that were written, not trained, with all edges known.

`planted.names()` lists them, `planted.plant("induction", noise=0.1, distractors=8)` makes one,
`planted.induction(...)` is the same. Each is built to break some way to find circuits; its file
draws it and says how.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.planted.factory import Planted

__all__ = ["names", "plant"]

CIRCUITS = {
    "induction": "repeats",
    "ioi_chain": "chain",
    "and_gate": "gates",
    "or_gate": "gates",
    "cancellation": "cancelling",
    "saturation": "saturated",
    "parity": "coins",
    "balance": "alarm",
    "backup": "hydra",
}
"""The module of each circuit; imported when it is asked for."""


def names() -> list[str]:
    """The circuits that `plant` knows.

    >>> planted.names()
    ['induction', 'ioi_chain', 'and_gate', 'or_gate', 'cancellation', 'saturation', 'parity', ...]
    """
    return list(CIRCUITS)


def plant(
    name: str, *, pairs: int = 16, seed: int = 0, noise: float = 0.0, distractors: int = 0
) -> Planted:
    """A planted circuit by name: its model, its task and its true edges.

    >>> found = planted.plant("or_gate", pairs=4, distractors=2)
    >>> found.direction
    'denoise'

    Args:
        name: one of `names()`.
        pairs: pairs of prompts of its task.
        seed: of prompts, noise and distractors.
        noise: standard deviation of what is added to the weights, as a share of their own size:
            the root mean square of each kind of matrix.
        distractors: further heads that are active and differ between clean and corrupt prompts,
            but write only where nothing of the circuit reads.

    Raises:
        ValueError: there is no such circuit, or a dial is out of its range.
    """
    if name not in CIRCUITS:
        raise ValueError(
            f"a planted circuit must be one of {', '.join(CIRCUITS)}; got {name!r}; "
            "`planted.names()` lists them"
        )
    found: Planted = _factory(name)(pairs, seed, noise, distractors)
    return found


def _factory(name: str) -> Any:
    return getattr(import_module(f"{__name__}.{CIRCUITS[name]}"), name)


def __getattr__(name: str) -> Any:
    if name not in CIRCUITS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _factory(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *CIRCUITS})
