"""Files of Gemma Scope (arXiv:2408.05147): `params.npz`; of Gemma Scope 2: `params.safetensors`.

Both hold w_enc [d_in, F], w_dec [F, d_out], b_enc, b_dec and the thresholds of a JumpReLU, in
either case; b_dec is not subtracted from the input. Skip transcoders of Gemma Scope 2 have
`affine_skip_connection` [d_in, d_out]. What they are of is in the names of folders
(`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`) or, in Gemma Scope 2, in a `config.json`
beside them. Attention dictionaries are of the heads' mixed values before W_O (`L12.z`).
"""

from __future__ import annotations

import re
from pathlib import Path

from relp.dictionaries.activations import JumpRelu
from relp.dictionaries.dictionary import Dictionary
from relp.dictionaries.hook_names import NOWHERE, Place, before_gain, place_of
from relp.dictionaries.weights import Weights, json_of, npz_of, safetensors_of

__all__ = ["load_first", "load_second"]

KEYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
SKIP = "affine_skip_connection"
PARTS = {
    "res": "resid", "resid_post": "resid", "att": "z", "attn_out": "z", "mlp": "mlp",
    "mlp_out": "mlp",
}  # fmt: skip
"""Kinds of autoencoders in names of folders, and parts of a block; `resid` is of the next one."""


def load_first(path: Path) -> Dictionary:
    """A dictionary of Gemma Scope, from `params.npz`.

    Its transcoders read what the norm before the MLP gives before its gain: see `hook_names`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds pickled objects, or not the tensors that it must.
    """
    reads, writes, transcoder = _from_folders(path)
    if reads.site.endswith(".mlp_in"):
        layer = int(reads.site[1:].partition(".")[0])
        reads = before_gain(layer, "what transcoders of Gemma Scope read")
    return _built(npz_of(path), path, reads, writes, transcoder)


def load_second(path: Path) -> Dictionary:
    """A dictionary of Gemma Scope 2, from `params.safetensors`.

    Its transcoders read what the MLP reads, behind norm and gain.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a cross-coder, or holds not the tensors that it must.
    """
    reads, writes, transcoder = _from_folders(path)
    if (config := path.with_name("config.json")).is_file():
        settings = json_of(config)
        if (architecture := settings.get("architecture", "jump_relu")) != "jump_relu":
            raise ValueError(
                f"{str(config)!r}: the architecture must be jump_relu; got {architecture!r}; build "
                "a relp.Dictionary from its tensors"
            )
        said = place_of("", module=str(settings.get("hf_hook_point_in") or ""))
        out = place_of("", module=str(settings.get("hf_hook_point_out") or ""))
        if said.site:
            reads = said
            transcoder = bool(out.site) and out.site != said.site
            writes = out if transcoder else said
    return _built(safetensors_of(path), path, reads, writes, transcoder)


def _built(
    found: Weights, path: Path, reads: Place, writes: Place, transcoder: bool
) -> Dictionary:  # fmt: skip
    weights = Weights(found.source, {name.lower(): t for name, t in found.tensors.items()})
    about = "a JumpReLU dictionary of Gemma Scope"
    if "w_dec" in weights and weights.tensors["w_dec"].dim() != 2:
        raise ValueError(
            f"{found.source!r}: the decoder must be a matrix [feature, d_out]; got "
            f"{list(weights.tensors['w_dec'].shape)}, as cross-coders and cross-layer transcoders "
            "have it; use a dictionary of one layer"
        )
    weights.only({*KEYS, SKIP}, about)
    w_enc, w_dec, b_enc, b_dec, threshold = (weights.take(n, n.upper(), of=about) for n in KEYS)
    skip = weights.take(SKIP, of=about) if SKIP in weights else None
    doubt = reads.doubt or writes.doubt
    if any("embedding" in part for part in path.absolute().parts[-4:]):
        doubt = (
            "dictionaries of embeddings are of embeddings without the model's factor √d_model; "
            "divide w_enc by it and multiply w_dec and b_dec, then dictionary.placed('L0.resid')"
        )
    return Dictionary(
        w_enc,
        w_dec,
        b_enc,
        b_dec,
        JumpRelu(threshold),
        reads=reads.site,
        writes=writes.site,
        w_skip=skip,
        name=found.source,
        transcodes=transcoder or skip is not None,
        doubt=doubt,
    )


def _from_folders(path: Path) -> tuple[Place, Place, bool]:
    """Where a dictionary reads and writes, and whether it is a transcoder, by names of folders."""
    parts = path.absolute().parts[-12:]
    layers = [found[1] for part in parts if (found := re.match(r"layer_(\d+)", part))]
    kinds = {part.removesuffix("_all") for part in parts}
    kinds |= {part.rpartition("-")[2] for part in parts if "gemma-scope-" in part}
    if kinds & {"transcoder", "transcoders"}:
        if not layers:
            return NOWHERE, NOWHERE, True
        return Place(f"L{layers[-1]}.mlp_in"), Place(f"L{layers[-1]}.mlp"), True
    said = [part for kind, part in PARTS.items() if kind in kinds]
    if not (layers and said):
        return NOWHERE, NOWHERE, False
    block = int(layers[-1]) + (said[0] == "resid")
    place = Place(f"L{block}.{said[0]}")
    return place, place, False
