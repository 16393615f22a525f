"""Which models there are by name: those that come with the package, and those to fetch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tasks.zoo.downloads import DOWNLOADS, Download, cache, kept, take_out

__all__ = ["HERE", "Model", "cache", "models", "names", "remove", "shipped"]

HERE = Path(__file__).parent
LICENCE = "Apache-2.0"
"""Of the models that come with the package: its own."""


@dataclass(frozen=True)
class Model:
    """A model that `zoo.load` knows by name.

    >>> from tasks.zoo.shelf import models
    >>> [model.name for model in models()]
    ['ioi-gpt2', 'ioi-llama', 'smollm2-135m']
    """

    name: str
    parameters: int
    size: int
    """Bytes of its folder on this disk; 0 if it is not there."""
    state: str
    """Where it is, in words."""
    licence: str


def shipped() -> list[str]:
    """The models that come with the package."""
    return sorted(config.parent.name for config in HERE.glob("*/config.json"))


def names() -> list[str]:
    """The models that `load` knows by name: those that come with the package or can be fetched.

    >>> zoo.names()
    ['ioi-gpt2', 'ioi-llama', 'smollm2-135m']
    """
    return [*shipped(), *DOWNLOADS]


def models() -> list[Model]:
    """All of them, with what is known of each without loading it."""
    ours = [_on_disk(HERE / name, "comes with relp", LICENCE) for name in shipped()]
    return [*ours, *map(_fetchable, DOWNLOADS.values())]


def remove(name: str) -> Path:
    """Takes a fetched model out of the cache; gives the folder that it was in.

    Raises:
        ValueError: there is no such model, it comes with the package, or it is not in the cache.
        OSError: the cache cannot be written.
    """
    if name not in DOWNLOADS:
        raise ValueError(
            f"a model to remove must be one of {', '.join(DOWNLOADS)}; got {name!r}"
            f"{', which comes with relp' if name in shipped() else ''}; `relp models` lists them"
        )
    return take_out(DOWNLOADS[name])


def _fetchable(download: Download) -> Model:
    if folder := kept(download):
        return _on_disk(folder, "in the cache", download.licence)
    state = f"to fetch ({download.size / 1e6:.0f} MB)"
    return Model(download.name, download.parameters, 0, state, download.licence)


def _on_disk(folder: Path, state: str, licence: str) -> Model:
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    parameters = sum(map(_parameters, folder.glob("*.safetensors")))
    return Model(folder.name, parameters, size, state, licence)


def _parameters(path: Path) -> int:
    """How many numbers a .safetensors file holds: its header says it, which is JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(prod(of["shape"]) for name, of in header.items() if name != "__metadata__")
