"""Folders of dictionary_learning (github.com/saprmarks/dictionary_learning): config.json, ae.pt.

The class that the config names says the formula; `ae.pt` is its state dict, read with torch's
reader that takes tensors alone. AutoEncoder, Gated, TopK and BatchTopK hold linear modules (encoder
[F, d], decoder [d, F]) and subtract their bias from the input, AutoEncoderNew does not; JumpReLU
and Matryoshka hold W_enc [d, F], W_dec [F, d], and JumpReLU does not subtract. BatchTopK and
Matryoshka are used with the threshold that training left. An AutoEncoder is brought to decoder
rows of length 1 when it is loaded, as in the original, so its values are in those units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relp.dictionaries.activations import Activation, Gated, JumpRelu, Relu, TopK
from relp.dictionaries.dictionary import Dictionary
from relp.dictionaries.hook_names import NOWHERE, Place, place_of
from relp.dictionaries.weights import Weights, json_of

__all__ = ["load"]

CONFIG, WEIGHTS = "config.json", "ae.pt"

SUBTRACTS = {
    "AutoEncoder": True,
    "AutoEncoderNew": False,
    "GatedAutoEncoder": True,
    "JumpReluAutoEncoder": False,
    "AutoEncoderTopK": True,
    "BatchTopKSAE": True,
    "MatryoshkaBatchTopKSAE": True,
}
"""The classes that are known, and whether they subtract their bias from the input."""

PARTS = {
    "resid_post": "resid", "resid_out": "resid", "attn_out": "attn", "attention_out": "attn",
    "mlp_out": "mlp",
}  # fmt: skip
"""Submodules as training scripts call them, and parts of a block; `resid` is of the next one."""


def load(path: Path) -> Dictionary:
    """A dictionary from a folder of dictionary_learning, or from one of its two files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a class that is not known, a file that holds more than tensors, or weights that
            do not fit.
    """
    folder = path if path.is_dir() else path.parent
    settings = json_of(folder / CONFIG)
    trainer = settings.get("trainer") or settings
    weights = _weights(folder / WEIGHTS)
    kind = trainer.get("dict_class")
    if kind not in SUBTRACTS:
        raise ValueError(
            f"{str(folder / CONFIG)!r}: trainer.dict_class must be one of {', '.join(SUBTRACTS)}; "
            f"got {kind!r}; write the class that was trained into it"
        )
    w_enc = _matrix(weights, "W_enc", "encoder.weight", kind)
    w_dec = _matrix(weights, "W_dec", "decoder.weight", kind)
    b_dec = weights.take("b_dec", "bias", "decoder_bias", "decoder.bias", of=kind)
    gated = kind == "GatedAutoEncoder"
    b_enc = w_enc.new_zeros(w_enc.shape[1])
    if not gated:
        b_enc = weights.take("b_enc", "encoder.bias", of=kind)
    if kind == "AutoEncoder":
        norms = w_dec.norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms)):
            w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    place = _place(trainer)
    return Dictionary(
        w_enc,
        w_dec,
        b_enc,
        b_dec,
        _activation(kind, trainer, weights, w_enc.shape[1]),
        reads=place.site,
        writes=place.site,
        subtracts=SUBTRACTS[kind],
        name=str(folder),
        doubt=place.doubt,
    )


def _weights(path: Path) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} must hold the weights; there is no such file; fetch it beside {CONFIG}"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is in a file that is none
        found = error
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        what = type(found).__name__
        raise ValueError(
            f"{str(path)!r} must be a state dict of tensors alone; got {what} (whatever else may "
            "be in it is code, which is not run); save module.state_dict() again"
        )
    return Weights(str(path), found)


def _matrix(weights: Weights, plain: str, linear: str, kind: str) -> Tensor:
    """A matrix as it multiplies from the right; a linear module holds it the other way."""
    if plain in weights:
        return weights.take(plain, of=kind)
    return weights.take(linear, plain, of=kind).T


def _activation(
    kind: str, trainer: Mapping[str, Any], weights: Weights, features: int
) -> Activation:
    if kind == "GatedAutoEncoder":
        b_gate, b_mag = weights.take("gate_bias", of=kind), weights.take("mag_bias", of=kind)
        return Gated(b_gate, b_mag, weights.take("r_mag", of=kind))
    if kind == "AutoEncoderTopK":
        saved = int(weights.take("k", of=kind)) if "k" in weights else None
        k = trainer.get("k", saved)
        if k is None or saved not in (None, k):
            raise ValueError(
                f"{weights.source!r}: config.json and weights must agree on k; got "
                f"{trainer.get('k')} and {saved}; write the right one into config.json"
            )
        return TopK(int(k))
    if kind in ("JumpReluAutoEncoder", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        return JumpRelu(weights.take("threshold", of=kind).expand(features).clone())
    return Relu()


def _place(trainer: Mapping[str, Any]) -> Place:
    """`resid_post_layer_8` is what the submodule is called in training scripts."""
    name = str(trainer.get("submodule_name") or "")
    found = re.fullmatch(r"(\w+?)_layer_?(\d+)", name)
    if found is None or found[1] not in PARTS:
        return place_of("", module=name) if name else NOWHERE
    part = PARTS[found[1]]
    return Place(f"L{int(found[2]) + (part == 'resid')}.{part}")
