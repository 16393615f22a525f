"""Which models have dictionaries, of which sites, and how they are trained: numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the dictionaries of one model are trained, all at once and on the same texts.

    >>> from tasks.zoo.dictionaries.recipes import RECIPES
    >>> RECIPES["smollm2-135m"].sites
    ('L8.mlp', 'L11.resid')
    """

    sites: tuple[str, ...]
    """In the order of a forward pass."""
    features: int
    """Of each dictionary."""
    active: int
    """How many features are on for a vector, on average (L0)."""
    rounds: int
    """Texts are read so many times, fresh ones each time."""
    texts: int
    """How many in a round: documents of the corpus; rows of prose for a model that is fetched."""
    passes: int
    """How often the vectors of a round are gone through."""
    batch: int
    """Vectors in a step of the optimizer."""
    rate: float
    """The highest learning rate."""
    dtype: str
    """Of the weights in the files; they are read back as float32."""


SMALL = Recipe(
    sites=(
        "L0.mlp",
        *(f"L{layer}.{part}" for layer in range(1, 6) for part in ("resid", "mlp")),
        "final",
    ),
    features=224,  # with two bytes for a number all 24 dictionaries take less than 3.5 MB
    active=16,
    rounds=40,
    texts=512,
    passes=2,
    batch=1024,
    rate=8e-3,
    dtype="float16",
)

RECIPES = {
    "ioi-gpt2": SMALL,
    "ioi-llama": SMALL,
    # An MLP that agreement of subject and verb needs, and the stream as late as all of its
    # vectors are of about one length: block 11 adds one of length 25,000 to the first token's.
    "smollm2-135m": Recipe(
        sites=("L8.mlp", "L11.resid"),
        features=4096,
        active=32,
        rounds=24,
        texts=64,
        passes=2,
        batch=512,
        rate=4e-3,
        dtype="float32",
    ),
}
