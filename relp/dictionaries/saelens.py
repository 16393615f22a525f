"""Folders of SAELens: `cfg.json` and `sae_weights.safetensors`; read here, and written.

Layout and formulas are those of SAELens 6.54 (`sae_lens/saes/*.py`) and of its conversion of flat
configs from before 6.0: W_enc [d_in, F], W_dec [F, d_out], b_enc, b_dec; `threshold` of a jumprelu;
b_gate, b_mag, r_mag and no b_enc of a gated; W_skip [d_out, d_in] of a skip transcoder. What
rescales features without changing what is computed is folded in: `rescale_acts_by_decoder_norm`
(norms into the encoder) and, before 6.0, `finetuning_scaling_factor` (into the decoder's rows).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from relp.dictionaries.activations import Activation, Gated, JumpRelu, Relu, TopK, parameters
from relp.dictionaries.dictionary import Dictionary
from relp.dictionaries.hook_names import HEADS_APART, hook_of, place_of
from relp.dictionaries.normalizations import LayerNorm, Normalization, Scaled, UnitNorm
from relp.dictionaries.weights import Weights, json_of, safetensors_of
from relp.files import written_whole

__all__ = ["load", "of_object", "save_dictionary"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

NONLINEARITY = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batchtopk",  # a checkpoint of training; for use it is saved as jumprelu
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""By architecture."""
WRITTEN = "6.0.0"
"""The version whose layout `save_dictionary` writes; readers ask whether it is at least 6."""


def load(path: Path, scale: float | None = None) -> Dictionary:
    """A dictionary from a folder of SAELens.

    Args:
        path: where the two files lie, or one of them.
        scale: what vectors were multiplied by in training, if the config says
            `expected_average_only_in` and the file is from before that was folded in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an architecture, normalisation or setting that is not known, or weights that do
            not fit it.
    """
    folder = path if path.is_dir() else path.parent
    config = json_of(folder / CONFIG)
    return _built(config, safetensors_of(folder / WEIGHTS), str(folder), scale)


def of_object(sae: Any) -> Dictionary:
    """A dictionary from a SAELens SAE or transcoder in memory, which is not changed.

    Raises:
        ValueError: as for a folder.
    """
    cfg = sae.cfg
    config = dict(cfg.to_dict() if hasattr(cfg, "to_dict") else vars(cfg))
    if "architecture" not in config and callable(getattr(cfg, "architecture", None)):
        config["architecture"] = cfg.architecture()
    names = (
        *("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "topk_threshold", "b_gate", "b_mag"),
        *("r_mag", "W_skip", "finetuning_scaling_factor"),
    )
    found = {name: getattr(sae, name, None) for name in names}
    tensors = {n: t.detach().clone() for n, t in found.items() if isinstance(t, Tensor)}
    name = f"{type(sae).__name__} of SAELens"
    return _built(config, Weights(name, tensors), name, None)


def _built(
    config: Mapping[str, Any], weights: Weights, name: str, scale: float | None
) -> Dictionary:
    """A dictionary from settings and tensors, whichever version they are of."""
    architecture = _architecture(config, name)
    about = f"the architecture {architecture!r}"
    transcoder = architecture.endswith("transcoder")
    w_enc, w_dec = weights.take("W_enc", of=about), weights.take("W_dec", of=about)
    _check_widths(config, w_enc, name)
    b_dec, kind = weights.take("b_dec", of=about), NONLINEARITY[architecture]
    b_enc = w_enc.new_zeros(w_enc.shape[1]) if kind == "gated" else weights.take("b_enc", of=about)
    if (factor := _finetuned(config, weights, name)) is not None:
        w_dec = w_dec * factor[:, None]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = w_dec.norm(dim=1)
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    meta = config.get("metadata") or config  # flat before 6.0
    reads = place_of(
        str(meta.get("hook_name") or meta.get("hook_point") or ""),
        module=str(meta.get("hf_hook_name") or ""),
        transcoder=transcoder,
    )
    writes, doubt = reads.site, reads.doubt
    if transcoder:
        out = str(meta.get("hook_name_out") or "")
        there = place_of(out, module=str(meta.get("hf_hook_name_out") or ""))
        writes, doubt = there.site, doubt or there.doubt
    elif reads.site.endswith(".mlp_in") and doubt:
        doubt = (
            f"its hook name {meta.get('hook_name')!r} is before the gain of the norm, where a model"
            " that is not folded has no site; use a dictionary of another place"
        )
    head = meta.get("hook_head_index", meta.get("hook_point_head_index"))
    if head is not None:
        doubt = (
            f"it is of head {head} alone, where a site holds all heads beside each other; use a "
            "dictionary of all heads"
        )
    w_skip = weights.take("W_skip", of=about).T if "skip" in architecture else None
    return Dictionary(
        w_enc,
        w_dec,
        b_enc,
        b_dec,
        _activation(kind, config, weights, about),
        reads=reads.site,
        writes=writes,
        subtracts=bool(config.get("apply_b_dec_to_input", not transcoder)),
        normalization=_normalization(config, name, transcoder, scale),
        w_skip=w_skip,
        name=name,
        transcodes=transcoder,
        doubt=doubt,
    )


def _architecture(config: Mapping[str, Any], name: str) -> str:
    architecture = str(config.get("architecture", "standard"))
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if architecture not in NONLINEARITY or function not in ("relu", "topk"):
        raise ValueError(
            f"{name!r}: the architecture must be one of {', '.join(NONLINEARITY)} with activation "
            f"relu or topk; got {architecture!r} with {function!r}; build a relp.Dictionary from "
            "its tensors if it computes the same as one of them"
        )
    return "topk" if function == "topk" and architecture == "standard" else architecture


def _check_widths(config: Mapping[str, Any], w_enc: Tensor, name: str) -> None:
    expected = [config.get("d_in"), config.get("d_sae")]
    if None not in expected and list(w_enc.shape) != expected:
        turned = list(w_enc.shape) == expected[::-1]
        raise ValueError(
            f"{name!r}: W_enc must be [d_in, d_sae] = {expected} by its config; got "
            f"{list(w_enc.shape)}; {'transpose it' if turned else 'take files that go together'}"
        )


def _finetuned(config: Mapping[str, Any], weights: Weights, name: str) -> Tensor | None:
    """What each feature is multiplied by before the decoder, before SAELens 6."""
    names = [n for n in ("finetuning_scaling_factor", "scaling_factor") if n in weights]
    if not names:
        return None
    factor = weights.take(names[0], of="a finetuned dictionary")
    if bool((factor == 1).all()):
        return None
    if not config.get("finetuning_scaling_factor"):
        raise ValueError(
            f"{name!r}: weights with a {names[0]} other than 1 must come with "
            "finetuning_scaling_factor: true in cfg.json; got none; set it if the dictionary was "
            "finetuned, or delete the tensor"
        )
    return factor


def _activation(
    kind: str, config: Mapping[str, Any], weights: Weights, about: str
) -> Activation:  # fmt: skip
    if kind == "jumprelu":
        return JumpRelu(weights.take("threshold", of=about))
    if kind == "batchtopk":
        threshold = weights.take("topk_threshold", "threshold", of=about)
        return JumpRelu(threshold.expand(weights.tensors["W_enc"].shape[1]).clone())
    if kind == "gated":
        b_gate, b_mag = weights.take("b_gate", of=about), weights.take("b_mag", of=about)
        return Gated(b_gate, b_mag, weights.take("r_mag", of=about))
    if kind == "topk":
        k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
        if k is None:
            raise ValueError(
                f"{weights.source!r}: the config of a topk dictionary must say k; it has "
                f"{', '.join(sorted(config))}; write it into cfg.json"
            )
        return TopK(int(k))
    return Relu()


def _normalization(
    config: Mapping[str, Any], name: str, transcoder: bool, scale: float | None
) -> Normalization:
    found = config.get("normalize_activations") or "none"
    found = "expected_average_only_in" if found is True else str(found)
    if scale is not None and (transcoder or found not in ("none", "expected_average_only_in")):
        raise ValueError(
            f"{name!r}: `scale` must be for an autoencoder with normalize_activations none or "
            f"expected_average_only_in; got {scale:g} for {'a transcoder with ' * transcoder}"
            f"{found}; leave it out"
        )
    known: dict[str, Normalization] = {
        "none": Scaled(1.0 if scale is None else scale),
        "constant_norm_rescale": UnitNorm(),
        "layer_norm": LayerNorm(),
    }
    if found == "expected_average_only_in" and scale is None:
        raise ValueError(
            f"{name!r}: the scale of normalize_activations 'expected_average_only_in' must be "
            "known, and no file holds it; pass load_dictionary(path, scale=√d_in / mean length of "
            "the vectors), or scale=1.0 if it is folded into the weights"
        )
    if found not in known and found != "expected_average_only_in":
        raise ValueError(
            f"{name!r}: normalize_activations must be one of {', '.join(known)} or "
            f"expected_average_only_in; got {found!r}; fold it into the weights, as SAELens does "
            "when it saves for inference"
        )
    return known.get(found, known["none"])


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> None:
    """Writes a folder that SAELens 6 reads with `SAE.load_from_disk`, and `load_dictionary`.

    Each file appears whole or not at all; a constant scale is folded into the weights.

    Raises:
        ValueError: SAELens has no such architecture.
        FileNotFoundError: the folder that is to hold the folder does not exist.
    """
    folder = Path(folder)
    config, tensors = _saelens(dictionary)
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"`folder` must lie in an existing folder; {str(folder.parent)!r} is none; create it "
            "first"
        )
    folder.mkdir(exist_ok=True)
    with written_whole(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    with written_whole(folder / CONFIG) as temporary:  # last: with it the folder is complete
        temporary.write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")


def _saelens(d: Dictionary) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a dictionary in SAELens' layout."""
    activation = d.activation
    factor = d.normalization.factor if isinstance(d.normalization, Scaled) else 1.0
    kind = {Relu: "standard", JumpRelu: "jumprelu", TopK: "topk", Gated: "gated"}[type(activation)]
    if d.is_transcoder:
        kind = {"standard": "", "jumprelu": "jumprelu_"}.get(kind, f"{kind}_")
        kind += "transcoder" if d.w_skip is None else "skip_transcoder"
    norm = d.normalization
    known = not isinstance(norm, LayerNorm) or norm == LayerNorm()
    if not (known and kind in NONLINEARITY and getattr(activation, "rectified", True)):
        raise ValueError(
            f"{d.called}: SAELens must have the architecture, one of {', '.join(NONLINEARITY)} "
            f"with ReLUs and the eps of its layer norm; got {kind!r} with {norm} and "
            f"{type(activation).__name__}; keep its tensors in a file of your own"
        )
    if d.doubt:
        raise ValueError(f"{d.called} must say where it reads before it is saved: {d.doubt}")
    norms = {UnitNorm: "constant_norm_rescale", LayerNorm: "layer_norm"}
    hooks = {"hook_name": hook_of(d.reads)} if d.reads else {}
    hooks |= {"hook_name_out": hook_of(d.writes)} if d.is_transcoder and d.writes else {}
    config: dict[str, Any] = {
        "architecture": kind,
        "d_in": d.d_in,
        "d_sae": d.features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": d.subtracts,
        "normalize_activations": norms.get(type(norm), "none"),
        "reshape_activations": HEADS_APART if d.reads.endswith(".z") else "none",
        "metadata": {"sae_lens_version": WRITTEN, **hooks},
    }
    tensors = {"W_enc": d.w_enc * factor, "W_dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec}
    if not d.is_transcoder:
        tensors |= {"W_dec": d.w_dec / factor, "b_dec": d.b_dec / factor}
    if d.is_transcoder:
        config["d_out"] = d.d_out
    if d.w_skip is not None:
        tensors["W_skip"] = d.w_skip.T
    if isinstance(activation, TopK):
        config |= {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(activation, Gated):  # it has no b_enc: what is added goes to gate and magnitude
        del tensors["b_enc"]
        tensors |= parameters(activation.shifted(d.b_enc))
    elif isinstance(activation, JumpRelu):
        tensors["threshold"] = activation.threshold
    return config, {n: t.detach().cpu().float().contiguous().clone() for n, t in tensors.items()}
