"""Sparse dictionaries (autoencoders and transcoders) as frozen values, from files on disk.

`load_dictionary` knows a format by the files that lie there; nothing is fetched, no code in a file
is run, and SAELens need not be installed. Own ones are written in SAELens' layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from relp.dictionaries import circuit_tracer, dictionary_learning, gemma_scope, saelens
from relp.dictionaries.activations import Activation, Gated, JumpRelu, Relu, TopK
from relp.dictionaries.dictionary import Dictionary
from relp.dictionaries.normalizations import LayerNorm, Normalization, Scaled, UnitNorm
from relp.dictionaries.saelens import save_dictionary

__all__ = [
    "Activation",
    "Dictionary",
    "Gated",
    "JumpRelu",
    "LayerNorm",
    "Normalization",
    "Relu",
    "Scaled",
    "TopK",
    "UnitNorm",
    "load_dictionary",
    "save_dictionary",
]

FORMATS: dict[str, tuple[str, Callable[..., Dictionary]]] = {
    saelens.WEIGHTS: ("SAELens", saelens.load),
    saelens.CONFIG: ("SAELens", saelens.load),
    "params.npz": ("Gemma Scope", gemma_scope.load_first),
    "params.safetensors": ("Gemma Scope 2", gemma_scope.load_second),
    dictionary_learning.WEIGHTS: ("dictionary_learning", dictionary_learning.load),
    "layer_*.safetensors": ("circuit-tracer", circuit_tracer.load),
}
"""What a format is known by: the name of a file; which format; how it is read from that file."""


def load_dictionary(path: str | os.PathLike[str], *, scale: float | None = None) -> Dictionary:
    """A dictionary from a file or folder of one of the known formats.

    SAELens (`cfg.json`, `sae_weights.safetensors`), Gemma Scope (`params.npz`), Gemma Scope 2
    (`params.safetensors`), dictionary_learning (`config.json`, `ae.pt`) and circuit-tracer
    (`layer_3.safetensors`).

    >>> import torch
    >>> from relp.dictionaries import Dictionary, Relu, load_dictionary, save_dictionary
    >>> own = Dictionary(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2), Relu())
    >>> save_dictionary(own, "own")
    >>> load_dictionary("own").fingerprint == own.fingerprint
    True

    Args:
        path: the file, or the folder that holds it.
        scale: what vectors are multiplied by before encoding, where a config of SAELens says
            `expected_average_only_in` and leaves the number out.

    Raises:
        FileNotFoundError: there is nothing, or a part is missing.
        ValueError: the files are of no known format, or broken.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must be a file or folder of a dictionary; {str(path)!r} does not exist; fetch "
            "it first: nothing is downloaded here"
        )
    for pattern, (name, read) in FORMATS.items():
        if path.is_file():
            found = [path] if path.match(pattern) else []
        else:
            found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise ValueError(
                f"{str(path)!r} must be the file of one layer; it holds those of {len(found)} "
                f"layers; name one, as {str(found[0])!r}"
            )
        if found and scale is not None and name != "SAELens":
            raise ValueError(
                f"`scale` must be for a folder of SAELens; got one for {name}; leave it out"
            )
        if found:
            return read(found[0]) if scale is None else read(found[0], scale)
    lies = path.name if path.is_file() else ", ".join(sorted(p.name for p in path.iterdir())[:8])
    raise ValueError(
        f"{str(path)!r} must hold one of {', '.join(FORMATS)}; got {lies or 'an empty folder'}; "
        "name the folder of one dictionary, or build a relp.Dictionary from tensors"
    )
