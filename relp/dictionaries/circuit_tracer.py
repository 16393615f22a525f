"""Transcoders of circuit-tracer (github.com/decoderesearch/circuit-tracer): one file a layer.

`layer_3.safetensors` holds W_enc [F, d_in] (the rows are features), W_dec [F, d_out], b_enc, b_dec,
and as it may be `activation_function.threshold`, `k`, W_skip [d_out, d_in]. A `config.yaml` beside
the files says which hook points all of them read and write, and a TopK's k. Above its threshold a
JumpReLU passes, and a TopK keeps, what is below 0 too. Writes that stand in the config as
`mlp.hook_out` are what an MLP adds only where no norm stands behind it.
"""

from __future__ import annotations

import re
from pathlib import Path

from relp.dictionaries.activations import Activation, JumpRelu, Relu, TopK
from relp.dictionaries.dictionary import Dictionary
from relp.dictionaries.hook_names import Place, place_of
from relp.dictionaries.weights import Weights, safetensors_of

__all__ = ["load"]

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
KEYS = {"W_enc", "W_dec", "b_enc", "b_dec", THRESHOLD, "k", "W_skip"}


def load(path: Path) -> Dictionary:
    """A transcoder from the file of its layer.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is of another kind, as of a cross-layer transcoder.
    """
    weights = safetensors_of(path)
    about = "a transcoder of circuit-tracer"
    if any(re.fullmatch(r"[Wb]_(enc|dec)_\d+", name) for name in weights.tensors):
        raise ValueError(
            f"{str(path)!r} must hold a transcoder that writes its own layer; got "
            f"{', '.join(sorted(weights.tensors))}, a cross-layer transcoder; use transcoders of "
            "single layers"
        )
    weights.only(KEYS, about)
    settings = _settings(path.with_name(CONFIG))
    layer = re.fullmatch(r"layer_(\d+)", path.stem)
    block = f"blocks.{layer[1]}." if layer else ""
    into, out = (settings.get(f"feature_{end}_hook", "") for end in ("input", "output"))
    reads = place_of(block + into if block and into else "", transcoder=True)
    writes = place_of(block + out) if block and out else Place(f"L{layer[1]}.mlp" if layer else "")
    skip = weights.take("W_skip", of=about).T if "W_skip" in weights else None
    return Dictionary(
        weights.take("W_enc", of=about).T,
        weights.take("W_dec", of=about),
        weights.take("b_enc", of=about),
        weights.take("b_dec", of=about),
        _activation(settings, weights, about),
        reads=reads.site,
        writes=writes.site,
        w_skip=skip,
        name=str(path),
        transcodes=True,
        doubt=reads.doubt or writes.doubt,
    )


def _activation(settings: dict[str, str], weights: Weights, about: str) -> Activation:
    kind = settings.get("activation", "")
    if kind == "relu":
        return Relu()
    if kind == "topk" or (not kind and "k" in weights):
        k = int(weights.take("k", of=about)) if "k" in weights else settings.get("k")
        if k is None:
            raise ValueError(
                f"{weights.source!r}: a topk transcoder must say k; neither it nor {CONFIG} beside "
                "it does; write `k: 64` into that, with the number it was trained with"
            )
        return TopK(int(k), rectified=False)
    if THRESHOLD in weights:
        threshold = weights.take(THRESHOLD, of=about)
        return JumpRelu(threshold.expand(len(weights.tensors["b_enc"])).clone(), rectified=False)
    return Relu()


def _settings(path: Path) -> dict[str, str]:
    """The plain settings of a config.yaml, `name: value` a line; lists are not wanted."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    found = (re.fullmatch(r"(\w+):\s*[\"']?([^\"'#\s]+)[\"']?\s*(#.*)?", line) for line in lines)
    return {line[1]: line[2] for line in found if line}
