"""Sparse dictionaries of the zoo's models: where they lie.

Those of the small models come with the package, those of a fetched model are made on this machine:
`python -m tasks.zoo.dictionaries smollm2-135m`. They are folders in the layout of SAELens.
"""

from __future__ import annotations

from pathlib import Path

from tasks.zoo.dictionaries.recipes import RECIPES
from tasks.zoo.shelf import HERE, cache, shipped

__all__ = ["dictionaries", "home"]


def dictionaries(model: str) -> dict[str, Path]:
    """The folders of a model's sparse dictionaries, by site, in the order of a forward pass.

    >>> found = zoo.dictionaries("ioi-gpt2")
    >>> list(found)[:3], found["final"].name
    (['L0.mlp', 'L1.resid', 'L1.mlp'], 'final')

    Args:
        model: its name.

    Raises:
        ValueError: none are known of this model, or they have not been made on this machine.
    """
    folder = home(model)
    found = {site: folder / site for site in RECIPES[model].sites}
    if missing := [site for site, path in found.items() if not (path / "cfg.json").is_file()]:
        raise ValueError(
            f"the dictionaries of {model!r} must have been made on this machine; {str(folder)!r} "
            f"has none of {', '.join(missing)}; make them with: python -m tasks.zoo.dictionaries "
            f"{model}"
        )
    return found


def home(model: str) -> Path:
    """The folder that a model's dictionaries are looked for in: the package's own, or the cache's.

    >>> from tasks.zoo.dictionaries import home
    >>> home("ioi-llama").parts[-2:]
    ('ioi-llama', 'dictionaries')

    Raises:
        ValueError: none are known of this model.
    """
    if model not in RECIPES:
        raise ValueError(
            f"a model with dictionaries must be one of {', '.join(RECIPES)}; got {model!r}; load "
            "others from their files with relp.load_dictionary"
        )
    # Beside a fetched model, not in it: fetching it anew must not cost what took longer to make.
    return HERE / model / "dictionaries" if model in shipped() else cache() / "dictionaries" / model
