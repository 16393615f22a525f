"""Sparse dictionaries: every format as its original lays it out, against slow second formulas.

The slow ones work on one vector and one feature at a time, in float64, from what the originals
compute (SAELens 6, dictionary_learning, circuit-tracer, and their loaders of Gemma Scope). Folders
written by the originals were compared once too: SAELens 6.54, 5.10 and 4.4, dictionary_learning
0.1.0 and circuit-tracer's class, 94 dictionaries, all within 5e-6 of values up to 31.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import relp
from relp.dictionaries import (
    Dictionary,
    Gated,
    JumpRelu,
    LayerNorm,
    Relu,
    Scaled,
    TopK,
    UnitNorm,
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    load_dictionary,
    save_dictionary,
)
from relp.dictionaries.hook_names import hook_of, place_of, same_site

D, F, OUT, K = 6, 16, 5, 4
NORMS = {"none": Scaled(), "layer_norm": LayerNorm(), "constant_norm_rescale": UnitNorm()}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user meets who has no annotations checked."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def drawn(*shape: int, seed: int = 0, scale: float = 0.5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def vectors(seed: int = 7) -> Tensor:
    return drawn(3, 4, D, seed=seed, scale=2.0) + 0.3


def plain(out: int = D) -> dict[str, Tensor]:
    """Tensors in SAELens' layout."""
    return {
        "W_enc": drawn(D, F, seed=1),
        "W_dec": drawn(F, out, seed=2),
        "b_enc": drawn(F, seed=3),
        "b_dec": drawn(out, seed=4),
    }


def gates() -> dict[str, Tensor]:
    return {name: drawn(F, seed=5 + i) for i, name in enumerate(("b_gate", "b_mag", "r_mag"))}


def thresholds() -> Tensor:
    return drawn(F, seed=8).abs()


# -- slow second implementations -------------------------------------------------------------------


def slow_values(kind: str, t: dict[str, Any], z: np.ndarray) -> np.ndarray:
    """What each feature of one vector holds; `t` has float64 arrays in SAELens' layout."""
    found = np.zeros(F)
    pre = [sum(z[i] * t["W_enc"][i, f] for i in range(D)) for f in range(F)]
    if kind != "gated":
        pre = [p + t["b_enc"][f] for f, p in enumerate(pre)]
    for f, p in enumerate(pre):
        if kind == "relu":
            found[f] = max(0.0, p)
        elif kind == "jumprelu":
            found[f] = max(0.0, p) if p > t["threshold"][f] else 0.0
        elif kind == "topk":
            found[f] = max(0.0, p) if sum(q > p for q in pre) < t["k"] else 0.0
        elif p + t["b_gate"][f] > 0:
            found[f] = max(0.0, np.exp(t["r_mag"][f]) * p + t["b_mag"][f])
    return found


def slow(
    kind: str, tensors: dict[str, Any], x: Tensor, *, subtracts=False, norm="none", transcoder=False
) -> tuple[np.ndarray, np.ndarray]:
    """Values in units of the site, and reconstructions."""
    t = {n: v.double().numpy() if isinstance(v, Tensor) else v for n, v in tensors.items()}
    all_values, all_outputs = [], []
    for row in x.double().flatten(0, -2).numpy():
        mean, out, z = 0.0, 1.0, row
        if norm == "layer_norm":
            mean = row.sum() / D
            out = np.sqrt(sum((v - mean) ** 2 for v in row) / (D - 1))
            z = (row - mean) / (out + 1e-5)
        elif norm == "constant_norm_rescale":
            out = np.sqrt(sum(v * v for v in row)) / np.sqrt(D)
            z = row / out
        if subtracts:
            z = z - t["b_dec"]
        values = slow_values(kind, t, z)
        if transcoder:
            mean, out = 0.0, 1.0
        decoded = sum(values[f] * t["W_dec"][f] for f in range(F)) + t["b_dec"]
        decoded = decoded * out + mean
        if "W_skip" in t:
            decoded = decoded + t["W_skip"] @ row
        all_values.append(values * out)
        all_outputs.append(decoded)
    lead = x.shape[:-1]
    return np.stack(all_values).reshape(*lead, F), np.stack(all_outputs).reshape(*lead, -1)


def assert_computes(found: Dictionary, values: np.ndarray, outputs: np.ndarray, x: Tensor) -> None:
    assert (values != 0).any() and (values == 0).any()
    np.testing.assert_allclose(found.encode(x), values, atol=2e-5)
    np.testing.assert_allclose(found.reconstruct(x), outputs, atol=2e-5)
    np.testing.assert_allclose(found.decode(found.encode(x)) + found.offset(x), outputs, atol=2e-5)
    some = torch.tensor([9, 2, 5])
    np.testing.assert_allclose(found.encode(x, some), values[..., [9, 2, 5]], atol=2e-5)
    torch.testing.assert_close(found.before(x, some), found.before(x)[..., some])
    rest = torch.tensor([f for f in range(F) if f not in (9, 2, 5)])
    both = found.decode(found.encode(x, some), some) + found.decode(found.encode(x, rest), rest)
    np.testing.assert_allclose(both + found.offset(x), outputs, atol=4e-5)
    assert found.sparsity(x) == pytest.approx((values != 0).sum(-1).mean())


# -- SAELens ---------------------------------------------------------------------------------------


def saelens(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def six(architecture: str, **others: Any) -> dict[str, Any]:
    """A config as SAELens 6 writes it."""
    meta = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post"}
    return {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": meta,
    } | others  # fmt: skip


KINDS = {"standard": "relu", "gated": "gated", "jumprelu": "jumprelu", "topk": "topk"}


def tensors_of(architecture: str) -> dict[str, Tensor]:
    tensors = plain()
    if architecture == "gated":
        del tensors["b_enc"]
        tensors |= gates()
    return tensors | ({"threshold": thresholds()} if architecture == "jumprelu" else {})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", KINDS)
def test_saelens_autoencoders(
    architecture: str, subtracts: bool, norm: str, tmp_path: Path
) -> None:
    tensors, x = tensors_of(architecture), vectors()
    more = {"k": K} if architecture == "topk" else {}
    config = six(
        architecture, apply_b_dec_to_input=subtracts, normalize_activations=norm, **more
    )  # fmt: skip
    found = load_dictionary(saelens(tmp_path / "sae", config, tensors))
    expected = slow(KINDS[architecture], tensors | more, x, subtracts=subtracts, norm=norm)
    assert_computes(found, *expected, x)
    assert (found.reads, found.writes, found.is_transcoder) == ("L4.resid", "L4.resid", False)
    assert (found.features, found.d_in, found.d_out) == (F, D, D)
    assert found.normalization == NORMS[norm]


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("skip", ["", "skip_"])
@pytest.mark.parametrize("jump", ["", "jumprelu_"])
def test_saelens_transcoders(jump: str, skip: str, norm: str, tmp_path: Path) -> None:
    tensors, x = plain(OUT), vectors()
    tensors |= {"threshold": thresholds()} if jump else {}
    tensors |= {"W_skip": drawn(OUT, D, seed=9)} if skip else {}
    meta = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    config = six(
        f"{jump}{skip}transcoder", d_out=OUT, apply_b_dec_to_input=False, metadata=meta,
        normalize_activations=norm,
    )  # fmt: skip
    found = load_dictionary(saelens(tmp_path / "sae", config, tensors))
    expected = slow("jumprelu" if jump else "relu", tensors, x, norm=norm, transcoder=True)
    assert_computes(found, *expected, x)
    assert (found.reads, found.writes, found.is_transcoder) == ("L3.mlp_in", "L3.mlp", True)
    assert found.d_out == OUT


def test_a_topk_whose_values_are_in_units_of_decoder_norms(tmp_path: Path) -> None:
    tensors, x = plain(), vectors()
    config = six("topk", k=K, rescale_acts_by_decoder_norm=True)
    found = load_dictionary(saelens(tmp_path / "sae", config, tensors))
    # the original multiplies pre-activations by the norms, and divides before the decoder
    norms = tensors["W_dec"].norm(dim=1)
    same = {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms}
    same |= {"W_dec": tensors["W_dec"] / norms[:, None], "b_dec": tensors["b_dec"]}
    assert_computes(found, *slow("topk", same | {"k": K}, x, subtracts=True), x)
    # it is another choice than without
    other = load_dictionary(saelens(tmp_path / "other", six("topk", k=K), tensors))
    assert not torch.equal(found.encode(x) != 0, other.encode(x) != 0)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_checkpoints_of_batch_topk_are_used_with_their_threshold(
    architecture: str, tmp_path: Path
) -> None:
    tensors, x = plain(), vectors()
    scalar = {"topk_threshold": torch.tensor(0.45, dtype=torch.float64)}
    found = load_dictionary(
        saelens(tmp_path / "sae", six(architecture, k=K), tensors | scalar)
    )  # fmt: skip
    expected = slow("jumprelu", tensors | {"threshold": torch.full((F,), 0.45)}, x, subtracts=True)
    assert_computes(found, *expected, x)


def flat(**others: Any) -> dict[str, Any]:
    """A config from before SAELens 6."""
    return {
        "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "hook_point_layer": 3,
        "hook_point": "blocks.3.hook_resid_pre", "hook_point_head_index": None,
        "model_name": "gpt2-small", "normalize_activations": "none",
    } | others  # fmt: skip


def test_flat_configs_from_before_saelens_6(tmp_path: Path) -> None:
    tensors, x = plain(), vectors()
    found = load_dictionary(saelens(tmp_path / "a", flat(), tensors))
    # b_dec is subtracted where the config says nothing
    assert_computes(found, *slow("relu", tensors, x, subtracts=True), x)
    assert found.reads == "L3.resid"
    topk = flat(activation_fn_str="topk", activation_fn_kwargs={"k": K}, normalize_activations=None)
    found = load_dictionary(saelens(tmp_path / "b", topk, tensors))
    assert_computes(found, *slow("topk", tensors | {"k": K}, x, subtracts=True), x)
    factor = drawn(F, seed=11).abs() + 0.5
    tuned = tensors | {"scaling_factor": factor}
    found = load_dictionary(
        saelens(tmp_path / "c", flat(finetuning_scaling_factor=True), tuned)
    )  # fmt: skip
    scaled = tensors | {"W_dec": tensors["W_dec"] * factor[:, None]}
    assert_computes(found, *slow("relu", scaled, x, subtracts=True), x)
    ones = tensors | {"scaling_factor": torch.ones(F)}
    found = load_dictionary(saelens(tmp_path / "d", flat(), ones))
    assert found.fingerprint == load_dictionary(tmp_path / "a").fingerprint


def test_a_scale_that_no_file_holds_is_asked_for(tmp_path: Path) -> None:
    tensors, x = plain(), vectors()
    config = six("standard", normalize_activations="expected_average_only_in")
    folder = saelens(tmp_path / "sae", config, tensors)
    with pytest.raises(ValueError, match="the scale of normalize_activations.*no file holds it"):
        load_dictionary(folder)
    found = load_dictionary(folder, scale=0.5)
    values, outputs = slow("relu", tensors, x * 0.5, subtracts=True)
    assert_computes(found, values * 2, outputs * 2, x)
    save_dictionary(found, tmp_path / "own")
    again = load_dictionary(tmp_path / "own")  # folded in, as SAELens does
    assert again.normalization == Scaled()
    torch.testing.assert_close(again.reconstruct(x), found.reconstruct(x))
    assert load_dictionary(folder, scale=1.0).normalization == Scaled()
    old = saelens(tmp_path / "old", flat(normalize_activations=True), tensors)
    with pytest.raises(ValueError, match="the scale of normalize_activations"):
        load_dictionary(old)


def test_names_of_saelens_that_can_mean_something_else(tmp_path: Path) -> None:
    gain = {"hook_name": "blocks.3.ln2.hook_normalized"}
    found = load_dictionary(saelens(tmp_path / "a", six("standard", metadata=gain), plain()))
    with pytest.raises(ValueError, match="a model that is not folded has no site; use a dict"):
        found.must_fit("L3.mlp_in", D, D)
    second = {
        "hook_name": "blocks.3.hook_mlp_in",
        "hook_name_out": "blocks.3.hook_mlp_out",
        "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_name_out": "model.layers.3.post_feedforward_layernorm.output",
    }
    config = six("transcoder", apply_b_dec_to_input=False, d_out=OUT, metadata=second)
    found = load_dictionary(saelens(tmp_path / "b", config, plain(OUT)))
    assert (found.reads, found.writes, found.doubt) == ("L3.mlp_in", "L3.mlp", "")
    del second["hf_hook_name"], second["hook_name_out"], second["hf_hook_name_out"]
    found = load_dictionary(saelens(tmp_path / "b", config, plain(OUT)))
    with pytest.raises(ValueError, match="before the norm in TransformerLens, where transcoders"):
        found.must_fit("L3.mlp_in", D, OUT)


def test_dictionaries_of_heads_read_them_beside_each_other(tmp_path: Path) -> None:
    meta = {"hook_name": "blocks.2.attn.hook_z"}
    config = six("standard", reshape_activations="hook_z", metadata=meta)
    found = load_dictionary(saelens(tmp_path / "sae", config, plain()))
    assert found.reads == "L2.z"
    found.must_fit("L2.z", D, D)
    save_dictionary(found, tmp_path / "own")
    written = json.loads((tmp_path / "own" / "cfg.json").read_text())
    assert written["reshape_activations"] == "hook_z"
    meta |= {"hook_head_index": 1}
    found = load_dictionary(saelens(tmp_path / "one", six("standard", metadata=meta), plain()))
    with pytest.raises(ValueError, match="it is of head 1 alone"):
        found.must_fit("L2.z", D, D)


# -- other formats ---------------------------------------------------------------------------------


def test_gemma_scope(tmp_path: Path) -> None:
    tensors, x = plain() | {"threshold": thresholds()}, vectors()
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in tensors.items()})
    for path in (folder, folder / "params.npz"):
        found = load_dictionary(path)
        assert_computes(found, *slow("jumprelu", tensors, x), x)
        assert (found.reads, found.writes) == ("L13.resid", "L13.resid")
    lower = tmp_path / "lower"
    lower.mkdir()
    np.savez(lower / "params.npz", **{n.lower(): t.numpy() for n, t in tensors.items()})
    found = load_dictionary(lower)
    assert found.reads == "" and found.fingerprint == load_dictionary(folder).fingerprint
    found.must_fit("L7.mlp", D, D)  # nothing is said against it


@pytest.mark.parametrize(
    "folder, site",
    [
        ("gemma-scope-9b-pt-att/layer_3/width_16k/l0", "L3.z"),
        ("gemma-scope-9b-pt-mlp/layer_3/width_16k/l0", "L3.mlp"),
        ("models--google--gemma-scope-2b-pt-res/snapshots/0a/layer_0/width_1m/l0", "L1.resid"),
    ],
)
def test_folders_of_gemma_scope_say_what_they_are_of(
    folder: str, site: str, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    arrays = {n: t.numpy() for n, t in (plain() | {"threshold": thresholds()}).items()}
    np.savez(tmp_path / folder / "params.npz", **arrays)
    assert load_dictionary(tmp_path / folder).reads == site


def test_transcoders_of_gemma_scope_read_before_the_gain(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_5" / "width_16k" / "average_l0_9"
    folder.mkdir(parents=True)
    tensors, x = plain(OUT) | {"threshold": thresholds()}, vectors()
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in tensors.items()})
    found = load_dictionary(folder)
    assert (found.reads, found.writes, found.is_transcoder) == ("L5.mlp_in", "L5.mlp", True)
    with pytest.raises(ValueError, match="before its gain.*'L5.mlp_in', 'L5.mlp', gain=...") as e:
        found.must_fit("L5.mlp", D, OUT)
    assert str(found.name) in str(e.value)
    gain = drawn(D, seed=12).abs() + 0.5
    placed = found.placed("L5.mlp_in", "L5.mlp", gain=gain)
    placed.must_fit("L5.mlp", D, OUT)
    placed.must_fit("L5.mlp_in", D, OUT)
    expected = slow("jumprelu", tensors, x, transcoder=True)  # x: what stands before the gain
    np.testing.assert_allclose(placed.encode(x * gain), expected[0], atol=2e-5)
    np.testing.assert_allclose(placed.reconstruct(x * gain), expected[1], atol=2e-5)
    folded = found.placed("L5.mlp_in", "L5.mlp")
    assert folded.fingerprint == found.fingerprint != placed.fingerprint


def test_gain_and_bias_of_a_layer_norm_with_a_skip_connection() -> None:
    x, gain, bias = vectors(), drawn(D, seed=12).abs() + 0.5, drawn(D, seed=13)
    t = plain(OUT)
    for activation in (Relu(), Gated(**gates())):
        own = Dictionary(
            t["W_enc"], t["W_dec"], t["b_enc"], t["b_dec"], activation, "L1.mlp_in", "L1.mlp",
            w_skip=drawn(D, OUT, seed=14), doubt="unsure",
        )  # fmt: skip
        placed = own.placed("L1.mlp_in", "L1.mlp", gain=gain, bias=bias)
        y = x * gain + bias
        torch.testing.assert_close(placed.encode(y), own.encode(x), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(placed.reconstruct(y), own.reconstruct(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2(skip: bool, tmp_path: Path) -> None:
    tensors, x = plain(OUT if skip else D) | {"threshold": thresholds()}, vectors()
    stored = {n.lower(): t for n, t in tensors.items()}
    folder = tmp_path / "resid_post_all" / "layer_7_width_16k_l0_small"
    if skip:
        folder = tmp_path / "transcoder_all" / "layer_7_width_16k_l0_small_affine"
        stored["affine_skip_connection"] = drawn(D, OUT, seed=9)
        tensors["W_skip"] = stored["affine_skip_connection"].T.contiguous()
    folder.mkdir(parents=True)
    save_file(stored, folder / "params.safetensors")
    found = load_dictionary(folder)
    assert_computes(found, *slow("jumprelu", tensors, x, transcoder=skip), x)
    expected = ("L7.mlp_in", "L7.mlp") if skip else ("L8.resid", "L8.resid")
    assert (found.reads, found.writes) == expected and found.doubt == ""


def test_the_config_of_gemma_scope_2_goes_before_names_of_folders(tmp_path: Path) -> None:
    stored = {n.lower(): t for n, t in (plain() | {"threshold": thresholds()}).items()}
    save_file(stored, tmp_path / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_dictionary(tmp_path)
    assert (found.reads, found.writes, found.is_transcoder) == ("L9.mlp_in", "L9.mlp", True)
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.9.output"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_dictionary(tmp_path)
    assert (found.reads, found.writes, found.is_transcoder) == ("L10.resid", "L10.resid", False)
    (tmp_path / "config.json").write_text('{"architecture": "other"}')
    with pytest.raises(ValueError, match="must be jump_relu; got 'other'"):
        load_dictionary(tmp_path)


def learned(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and trainer settings as dictionary_learning writes them."""
    t = plain()
    linear = {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T}
    trainer = {"dict_class": kind, "layer": 3, "submodule_name": "resid_post_layer_3"}
    if kind == "AutoEncoder":
        return linear | {"encoder.bias": t["b_enc"], "bias": t["b_dec"]}, trainer
    if kind == "AutoEncoderNew":
        return linear | {"encoder.bias": t["b_enc"], "decoder.bias": t["b_dec"]}, trainer
    if kind == "GatedAutoEncoder":
        g = gates()
        biases = {"gate_bias": g["b_gate"], "mag_bias": g["b_mag"], "r_mag": g["r_mag"]}
        return linear | biases | {"decoder_bias": t["b_dec"]}, trainer
    if kind == "JumpReluAutoEncoder":
        return t | {"threshold": thresholds()}, trainer
    scalars = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.4)}
    trainer |= {"k": K}
    if kind == "MatryoshkaBatchTopKSAE":
        return t | scalars | {"group_sizes": torch.tensor([4, 12])}, trainer
    return linear | scalars | {"encoder.bias": t["b_enc"], "b_dec": t["b_dec"]}, trainer


def learned_folder(folder: Path, state: dict[str, Tensor], trainer: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({n: t.contiguous() for n, t in state.items()}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


LEARNED = {
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_dictionary_learning(kind: str, tmp_path: Path) -> None:
    formula, subtracts = LEARNED[kind]
    folder = learned_folder(tmp_path / "ae", *learned(kind))
    tensors, x = plain() | gates() | {"threshold": thresholds(), "k": K}, vectors()
    if "TopK" in kind:
        tensors["threshold"] = torch.full((F,), 0.4)
    if kind == "AutoEncoder":  # brought to decoder rows of length 1
        norms = tensors["W_dec"].norm(dim=1)
        tensors |= {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms}
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    for path in (folder, folder / "ae.pt"):
        found = load_dictionary(path)
        assert_computes(found, *slow(formula, tensors, x, subtracts=subtracts), x)
        assert found.reads == found.writes == "L4.resid"


@pytest.mark.parametrize(
    "name, site",
    [
        ("mlp_out_layer_2", "L2.mlp"),
        ("attn_out_layer2", "L2.attn"),
        ("resid_out_layer0", "L1.resid"),
        ("other", ""),
        (None, ""),
    ],
)
def test_names_of_submodules(name: str | None, site: str, tmp_path: Path) -> None:
    state, trainer = learned("AutoEncoderNew")
    found = load_dictionary(
        learned_folder(tmp_path / "ae", state, trainer | {"submodule_name": name})
    )
    assert found.reads == site


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_circuit_tracer(kind: str, skip: bool, tmp_path: Path) -> None:
    t, x = plain(OUT), vectors()
    stored = t | {"W_enc": t["W_enc"].T.contiguous()}
    more: dict[str, Any] = {}
    if kind == "jumprelu":
        stored["activation_function.threshold"] = more["threshold"] = thresholds()
    if kind == "topk":
        stored["k"], more["k"] = torch.tensor(K), K
    if skip:
        stored["W_skip"] = more["W_skip"] = drawn(OUT, D, seed=9)
    save_file(stored, tmp_path / "layer_3.safetensors")
    (tmp_path / "config.yaml").write_text(
        'model_kind: transcoder_set  # one a layer\nfeature_input_hook: "mlp.hook_in"\n'
        "feature_output_hook: hook_mlp_out\ntranscoders:\n  - hf://a/b\n"
    )
    for path in (tmp_path, tmp_path / "layer_3.safetensors"):
        found = load_dictionary(path)
        assert_computes(found, *slow(kind, t | more, x, transcoder=True), x)
        assert (found.reads, found.writes) == ("L3.mlp_in", "L3.mlp")


def test_circuit_tracer_passes_what_is_below_zero() -> None:
    pre = torch.tensor([[-3.0, -0.2, 0.5, -1.0]])
    low = torch.full((4,), -0.5)
    torch.testing.assert_close(
        JumpRelu(low, rectified=False).values(pre), torch.tensor([[0, -0.2, 0.5, 0]])
    )
    torch.testing.assert_close(JumpRelu(low).values(pre), torch.tensor([[0, 0, 0.5, 0]]))
    torch.testing.assert_close(
        TopK(3, rectified=False).values(pre), torch.tensor([[0, -0.2, 0.5, -1.0]])
    )
    torch.testing.assert_close(TopK(3).values(pre), torch.tensor([[0, 0, 0.5, 0]]))
    assert TopK(3, rectified=False).slopes(pre).tolist() == [[0, 1, 1, 1]]
    assert JumpRelu(low, rectified=False).slopes(pre).tolist() == [[0, 1, 1, 0]]


def test_circuit_tracer_without_a_config_must_be_told_what_it_reads(tmp_path: Path) -> None:
    t = plain(OUT)
    save_file(t | {"W_enc": t["W_enc"].T.contiguous()}, tmp_path / "layer_3.safetensors")
    found = load_dictionary(tmp_path)
    assert (found.reads, found.writes, found.is_transcoder) == ("", "L3.mlp", True)
    with pytest.raises(ValueError, match=r"a transcoder must have.*'nothing' and 'L3.mlp'.*placed"):
        found.must_fit("L3.mlp", D, OUT)
    found.placed("L3.mid", "L3.mlp").must_fit("L3.mlp", D, OUT)


# -- writing ---------------------------------------------------------------------------------------


def made(kind: str = "relu", **others: Any) -> Dictionary:
    t = plain()
    activation = {
        "relu": Relu(),
        "jumprelu": JumpRelu(thresholds()),
        "topk": TopK(K),
        "gated": Gated(**gates()),
    }[kind]
    b_enc = torch.zeros(F) if kind == "gated" else t["b_enc"]
    where = {"reads": "L4.resid", "writes": "L4.resid", "subtracts": True} | others
    return Dictionary(t["W_enc"], t["W_dec"], b_enc, t["b_dec"], activation, **where)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "gated"])
def test_what_is_saved_comes_back(kind: str, norm: str, tmp_path: Path) -> None:
    own = made(kind, normalization=NORMS[norm])
    save_dictionary(own, tmp_path / "own")
    again, x = load_dictionary(tmp_path / "own"), vectors()
    assert again.fingerprint == own.fingerprint
    assert (again.reads, again.writes) == ("L4.resid", "L4.resid")
    assert torch.equal(again.reconstruct(x), own.reconstruct(x))
    names = sorted(p.name for p in (tmp_path / "own").iterdir())
    assert names == ["cfg.json", "sae_weights.safetensors"]
    config = json.loads((tmp_path / "own" / "cfg.json").read_text())
    hooks = {"hook_name": "blocks.4.hook_resid_pre"}
    assert config["metadata"] == {"sae_lens_version": "6.0.0"} | hooks
    save_dictionary(again, tmp_path / "own")  # over itself


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_that_are_saved_come_back(jump: bool, skip: bool, tmp_path: Path) -> None:
    t = plain(OUT)
    own = Dictionary(
        t["W_enc"], t["W_dec"], t["b_enc"], t["b_dec"],
        JumpRelu(thresholds()) if jump else Relu(), "L3.mlp_in", "L3.mlp",
        w_skip=drawn(D, OUT, seed=9) if skip else None,
    )  # fmt: skip
    save_dictionary(own, tmp_path / "own")
    again = load_dictionary(tmp_path / "own")
    assert again.fingerprint == own.fingerprint and again.is_transcoder
    assert (again.reads, again.writes) == ("L3.mlp_in", "L3.mlp")
    stored = load_file(tmp_path / "own" / "sae_weights.safetensors")
    assert not skip or list(stored["W_skip"].shape) == [OUT, D]


def test_the_bias_of_a_gated_encoder_is_saved_with_gate_and_magnitude(tmp_path: Path) -> None:
    own, x = replace(made("gated"), b_enc=drawn(F, seed=21)), vectors()
    save_dictionary(own, tmp_path / "own")
    again = load_dictionary(tmp_path / "own")
    torch.testing.assert_close(again.encode(x), own.encode(x))


@pytest.mark.parametrize(
    "own, text",
    [
        (made(reads="L3.mlp_in", writes="L3.mlp", subtracts=False), None),
        (replace(made("topk", subtracts=False), transcodes=True), "'topk_transcoder'"),
        (replace(made("topk"), activation=TopK(K, rectified=False)), "with ReLUs"),
        (replace(made(), normalization=LayerNorm(1e-3)), "eps of its layer norm"),
        (replace(made(), doubt="it may be another"), "before it is saved: it may be another"),
    ],
)
def test_what_saelens_has_not_is_not_saved(
    own: Dictionary, text: str | None, tmp_path: Path
) -> None:
    if text is None:
        save_dictionary(own, tmp_path / "own")
        return
    with pytest.raises(ValueError, match=text):
        save_dictionary(own, tmp_path / "own")
    assert not list(tmp_path.iterdir())


def test_nothing_is_saved_into_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`folder` must lie in an existing folder"):
        save_dictionary(made(), tmp_path / "no" / "own")


# -- slopes ----------------------------------------------------------------------------------------

ALL = ["relu", "jumprelu", "topk", "gated"]


@pytest.mark.parametrize("norm", ["none", "scaled"])
@pytest.mark.parametrize("kind", ALL)
def test_the_derivative_is_that_of_autograd(kind: str, norm: str) -> None:
    own = made(kind, normalization=Scaled(0.5 if norm == "scaled" else 1.0))
    x = vectors()
    pre = own.before(x).requires_grad_()
    values = own.activation.values(pre) * (2.0 if norm == "scaled" else 1.0)
    (expected,) = torch.autograd.grad(values.sum(), pre)
    found = own.slope(x, vectors(8), "derivative")
    torch.testing.assert_close(found, expected)
    assert (found != 0).any() and (found == 0).any()
    some = torch.tensor([3, 15, 0])
    torch.testing.assert_close(
        own.slope(x, vectors(8), "derivative", some), expected[..., some]
    )  # fmt: skip


@pytest.mark.parametrize("chosen", [None, torch.tensor([3, 15, 0])])
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("kind", ALL)
def test_a_secant_carries_the_whole_change_of_the_value(
    kind: str, factor: float, chosen: Tensor | None
) -> None:
    own, x, y = made(kind, normalization=Scaled(factor)), vectors(), vectors(8)
    scale, matrix = own.reading(x, chosen)
    through = own.slope(x, y, "secant", chosen) * scale * ((y - x) @ matrix)
    change = own.encode(y, chosen) - own.encode(x, chosen)
    assert ((own.encode(x) == 0) & (own.encode(y) != 0)).any()  # also of what was off
    torch.testing.assert_close(through, change, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_between_a_run_and_itself_a_secant_is_the_derivative(kind: str) -> None:
    own, x = made(kind), vectors()
    expected = own.slope(x, x, "derivative")
    assert torch.equal(own.slope(x, x, "secant"), expected)
    # also where two runs differ by rounding alone
    assert torch.equal(own.slope(x, x * (1 + 2**-23), "secant"), expected)


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_a_small_step_has_the_derivative(kind: str) -> None:
    own, x = made(kind), vectors()
    y = x + 1e-3 * drawn(3, 4, D, seed=30)
    same = (own.encode(x) != 0) == (own.encode(y) != 0)
    near, derivative = own.slope(x, y, "secant"), own.slope(x, y, "derivative")
    assert torch.equal(near[same], derivative[same])
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ALL)
def test_behind_a_normalisation_the_scale_of_the_own_run_holds(kind: str, norm: str) -> None:
    own, x, y = made(kind, normalization=NORMS[norm]), vectors(), vectors(8)
    scale, matrix = own.reading(x)
    # by hand: the other run read with the own run's scale
    if norm == "layer_norm":
        std = x.std(-1, keepdim=True)
        z, z_ = ((v - v.mean(-1, keepdim=True)) / (std + 1e-5) for v in (x, y))
        out = std
    else:
        out = x.norm(dim=-1, keepdim=True) / D**0.5
        z, z_ = x / out, y / out
    pre, pre_ = ((v - own.b_dec) @ own.w_enc + own.b_enc for v in (z, z_))
    torch.testing.assert_close(own.before(x), pre, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scale * ((y - x) @ matrix), pre_ - pre, atol=2e-5, rtol=1e-4)
    change = (own.activation.values(pre_) - own.activation.values(pre)) * out
    through = own.slope(x, y, "secant") * scale * ((y - x) @ matrix)
    torch.testing.assert_close(through, change, atol=2e-4, rtol=1e-3)
    expected = own.activation.slopes(pre) * out
    torch.testing.assert_close(own.slope(x, y, "derivative"), expected, atol=1e-5, rtol=1e-5)


def test_reading_without_a_normalisation_is_the_encoder() -> None:
    own, x, y = made(), vectors(), vectors(8)
    scale, matrix = own.reading(x)
    assert torch.equal(matrix, own.w_enc) and bool((scale == 1).all())
    change = own.before(y) - own.before(x)
    torch.testing.assert_close(scale * ((y - x) @ matrix), change, atol=1e-5, rtol=1e-5)


def test_a_gated_value_is_a_function_of_one_number() -> None:
    b_gate, b_mag, r_mag = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.0])
    gated = Gated(b_gate, b_mag, r_mag)
    pre = torch.tensor([[-2.0], [-0.75], [-0.25], [1.0]])
    # the gate opens above -1, the magnitude is positive above -0.5
    assert gated.values(pre).flatten().tolist() == [0, 0, 0.25, 1.5]
    assert gated.slopes(pre).flatten().tolist() == [0, 0, 1, 1]
    shifted = gated.shifted(torch.tensor([1.0]))
    assert torch.equal(shifted.values(pre - 1), gated.values(pre))


def test_no_other_rule(unchecked: None) -> None:
    other: Any = "gradient"
    with pytest.raises(ValueError, match="`rule` must be 'derivative' or 'secant'; got 'gradient'"):
        made().slope(vectors(), vectors(), other)


# -- measures and values ---------------------------------------------------------------------------


def test_explained_variance_by_hand() -> None:
    eye = torch.eye(2)
    only_first = Dictionary(
        eye, torch.tensor([[1.0, 0], [0, 0]]), torch.zeros(2), torch.zeros(2), Relu()
    )
    x = torch.tensor([[0.0, 1.0], [4.0, 3.0]])
    # squares about the mean (2, 2): 4 + 1 + 4 + 1; what is left: 1 + 9
    assert only_first.explained(x) == pytest.approx(0.0)
    x = torch.tensor([[0.0, -1.0], [4.0, 1.0]])  # 4 + 1 + 4 + 1; left 1 + 1
    assert only_first.explained(x) == pytest.approx(0.8)
    assert only_first.explained(x[None].half()) == pytest.approx(0.8)
    assert only_first.sparsity(x) == 1.0
    with pytest.raises(ValueError, match="of vectors that differ; got 3 alike"):
        only_first.explained(torch.ones(3, 2))


def test_a_transcoder_is_measured_by_what_it_writes() -> None:
    t, x = plain(OUT), vectors()
    own = Dictionary(t["W_enc"], t["W_dec"], t["b_enc"], t["b_dec"], Relu(), "L3.mlp_in", "L3.mlp")
    with pytest.raises(ValueError, match=r"`target` must be what the model holds.*explained\(x"):
        own.explained(x)
    assert own.explained(x, own.reconstruct(x)) == 1.0


def test_half_precision_is_widened_and_gradients_pass() -> None:
    own, x = made("jumprelu"), vectors()
    assert own.encode(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(own.encode(x.bfloat16()), own.encode(x.bfloat16().float()))
    single = own.reconstruct(x[0, 0])
    torch.testing.assert_close(single, own.reconstruct(x)[0, 0])
    step = x.clone().requires_grad_()
    own.reconstruct(step).sum().backward()
    assert step.grad is not None and bool((step.grad != 0).any())
    half = replace(own, w_enc=own.w_enc.half(), w_dec=own.w_dec.half(), b_dec=own.b_dec.half())
    assert half.encode(x).dtype == torch.float32


def test_a_topk_may_keep_one() -> None:
    own, x = replace(made("topk"), activation=TopK(1)), vectors()
    best = own.before(x).argmax(-1, keepdim=True)
    assert own.sparsity(x) == 1 and bool((own.encode(x).gather(-1, best) > 0).all())


def test_a_vector_of_zeros_stays_finite() -> None:
    for norm in (UnitNorm(), LayerNorm()):
        own = made(normalization=norm)
        assert bool(torch.isfinite(own.reconstruct(torch.zeros(2, D))).all())


def test_fingerprints_tell_what_is_computed() -> None:
    own = made("jumprelu")
    assert re.fullmatch(r"[0-9a-f]{16}", own.fingerprint)
    assert own.to("cpu").fingerprint == own.fingerprint
    assert replace(own, name="x", reads="", writes="").fingerprint == own.fingerprint
    others = [
        replace(own, w_enc=own.w_enc + 1e-6),
        replace(own, subtracts=False),
        replace(own, normalization=LayerNorm()),
        replace(own, activation=JumpRelu(thresholds() + 1)),
        replace(own, activation=JumpRelu(thresholds(), rectified=False)),
        made("topk"),
        replace(made("topk"), activation=TopK(K + 1)),
    ]
    assert len({own.fingerprint, *(d.fingerprint for d in others)}) == len(others) + 1
    turned = replace(own, w_dec=own.w_dec.T.contiguous().T)  # it lies in memory another way
    assert turned.fingerprint == own.fingerprint


def test_of_takes_values_paths_and_objects_of_saelens(tmp_path: Path) -> None:
    own = made("topk")
    assert Dictionary.of(own) is own
    save_dictionary(own, tmp_path / "own")
    assert Dictionary.of(tmp_path / "own").fingerprint == own.fingerprint
    assert Dictionary.of(str(tmp_path / "own")).fingerprint == own.fingerprint
    with pytest.raises(TypeError, match="a dictionary must be a relp.Dictionary.*got int; load"):
        Dictionary.of(3)
    with pytest.raises(TypeError, match="got Linear"):
        Dictionary.of(torch.nn.Linear(2, 2))


def test_an_object_whose_config_is_a_class_with_an_architecture() -> None:
    class Config(SimpleNamespace):
        def architecture(self) -> str:
            return "jumprelu"

    config = {n: v for n, v in six("").items() if n != "architecture"}
    sae = SimpleNamespace(cfg=Config(**config), threshold=thresholds(), **plain())
    assert isinstance(Dictionary.of(sae).activation, JumpRelu)


@pytest.mark.parametrize("architecture", KINDS)
def test_objects_that_look_like_those_of_saelens(architecture: str) -> None:
    config = six(architecture, k=K)
    tensors = {n: torch.nn.Parameter(t) for n, t in tensors_of(architecture).items()}
    sae = SimpleNamespace(cfg=SimpleNamespace(to_dict=lambda: config), b_enc=None)
    vars(sae).update(tensors)
    found, x = Dictionary.of(sae), vectors()
    expected = slow(
        KINDS[architecture], {n: t.data for n, t in tensors.items()} | {"k": K}, x, subtracts=True
    )
    assert_computes(found, *expected, x)
    assert found.name == "SimpleNamespace of SAELens" and not found.w_enc.requires_grad
    before = found.encode(x)
    sae.W_enc.data.zero_()  # it is a copy
    assert torch.equal(found.encode(x), before)


def test_relp_has_them() -> None:
    assert relp.Dictionary is Dictionary and relp.load_dictionary is load_dictionary


# -- names of places -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hook, site",
    [
        ("blocks.3.hook_resid_pre", "L3.resid"),
        ("blocks.3.hook_resid_mid", "L3.mid"),
        ("blocks.3.hook_resid_post", "L4.resid"),
        ("blocks.11.hook_out", "L12.resid"),
        ("blocks.3.hook_attn_out", "L3.attn"),
        ("blocks.3.hook_mlp_out", "L3.mlp"),
        ("blocks.3.attn.hook_z", "L3.z"),
        ("blocks.3.attn.hook_q", "L3.q"),
        ("blocks.3.mlp.hook_in", "L3.mlp_in"),
        ("blocks.3.mlp.hook_out", "L3.mlp"),
        ("blocks.3.mlp.hook_post", "L3.neurons"),
        ("blocks.3.hook_mlp_in", "L3.mid"),
        ("ln_final.hook_in", "final"),
        ("unembed.hook_in", "unembed"),
        ("L3.mixer", "L3.mixer"),
        ("", ""),
    ],
)
def test_hook_names(hook: str, site: str) -> None:
    assert place_of(hook) == (site, "")
    if site:
        assert place_of(hook_of(site)).site == site


@pytest.mark.parametrize(
    "module, site",
    [
        ("model.layers.3.output", "L4.resid"),
        ("model.language_model.layers.3.self_attn.o_proj.input", "L3.z"),
        ("model.layers.3.pre_feedforward_layernorm.output", "L3.mlp_in"),
        ("model.layers.3.post_feedforward_layernorm.output", "L3.mlp"),
        ("model.layers.3.post_attention_layernorm.output", ""),
        ("model.norm.output", ""),
    ],
)
def test_names_of_modules(module: str, site: str) -> None:
    assert place_of("", module=module).site == site


def test_names_that_can_mean_something_else_come_with_a_doubt() -> None:
    assert "none that is known" in place_of("blocks.3.mlp.hook_pre").doubt
    assert "none that is known" in place_of("transformer.h.3").doubt
    before = place_of("blocks.3.ln2.hook_normalized", transcoder=True)
    assert before.site == "L3.mlp_in" and "before its gain" in before.doubt
    unsure = place_of("blocks.3.hook_mlp_in", transcoder=True)
    assert "before the norm in TransformerLens" in unsure.doubt
    behind = "model.layers.3.pre_feedforward_layernorm.output"  # SAELens' Gemma Scope 2 says both
    assert place_of("blocks.3.hook_mlp_in", module=behind, transcoder=True) == ("L3.mlp_in", "")


def test_the_output_of_the_last_block_is_final() -> None:
    assert same_site("L12.resid", "final", 12) and same_site("final", "L12.resid", 12)
    assert not same_site("L11.resid", "final", 12) and same_site("L11.resid", "final")
    assert same_site("L1.resid", "final", 1)
    assert not same_site("L0.resid", "final") and not same_site("L3.mlp", "final")
    own = made(reads="L12.resid", writes="L12.resid")
    own.must_fit("final", D, D, blocks=12)
    own.must_fit("L12.resid", D, D)
    with pytest.raises(ValueError, match="must be a dictionary of 'final'; its file says 'L12.res"):
        own.must_fit("final", D, D, blocks=24)


def test_a_dictionary_must_fit_its_site() -> None:
    own = made(name="folder/of/it")
    own.must_fit("L4.resid", D, D)
    replace(own, reads="", writes="").must_fit("L9.mlp", D, D)
    with pytest.raises(
        ValueError,
        match=r"'folder/of/it' must be a dictionary of 'L3.mlp'; its file says 'L4.resid'; use it "
        r"there, or dictionary.placed\('L3.mlp'\)",
    ):
        own.must_fit("L3.mlp", D, D)
    own.placed("L3.mlp").must_fit("L3.mlp", D, D)
    with pytest.raises(ValueError, match="must read 768 and write 768 numbers.*reads 6 and writes"):
        own.must_fit("L4.resid", 768, 768)
    transcoder = made(reads="L3.mlp_in", writes="L3.mlp", subtracts=False)
    with pytest.raises(ValueError, match="its file says 'L3.mlp_in to L3.mlp'"):
        transcoder.must_fit("L4.mlp", D, D)


def test_a_gain_is_for_transcoders(unchecked: None) -> None:
    with pytest.raises(ValueError, match="got an autoencoder; leave gain out"):
        made().placed("L3.mlp_in", gain=torch.ones(D))
    own = made(subtracts=False, normalization=LayerNorm())
    with pytest.raises(ValueError, match=r"got one with LayerNorm\(eps=1e-05\); leave"):
        own.placed("L3.mlp_in", "L3.mlp", gain=torch.ones(D))
    for wrong in (torch.ones(D + 1), torch.zeros(D)):
        with pytest.raises(ValueError, match="gain and bias must be of 6 numbers, none of"):
            made(subtracts=False).placed("L3.mlp_in", "L3.mlp", gain=wrong)
    with pytest.raises(ValueError, match=r"got \[6\] and \[7\]; take those of the norm"):
        made(subtracts=False).placed("L3.mlp_in", "L3.mlp", bias=torch.ones(D + 1))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("w_enc", drawn(F, D), r"w_enc must be \[6, 16\].*got \[16, 6\]; transpose it"),
        ("w_dec", drawn(D, F), r"w_dec must be \[16, 6\].*got \[6, 16\]; transpose it"),
        ("w_enc", drawn(D, F + 1), r"w_enc must be \[6, 16\].*got \[6, 17\]; take weights"),
        ("b_enc", drawn(F + 1), r"w_enc must be \[6, 17\].*got \[6, 16\]; take weights"),
        ("w_skip", drawn(D, D + 1), r"w_skip must be \[6, 6\].*got \[6, 7\]"),
        ("activation", JumpRelu(drawn(F - 1)), r"threshold must be \[16\].*got \[15\]"),
        ("activation", TopK(F + 1), "k must be between 1 and its 16 features; got 17"),
        ("activation", TopK(0), "k must be between 1 and its 16 features; got 0"),
        ("writes", "L4.mlp", "only an autoencoder can subtract b_dec"),
    ],
)
def test_shapes_must_go_together(name: str, value: Any, text: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=text):
        replace(made(name="it"), **{name: value})


@pytest.mark.parametrize(
    "config, change, text",
    [
        ({"architecture": "abstopk"}, {}, "must be one of standard, gated.*got 'abstopk' with"),
        ({"activation_fn": "tanh-relu"}, {}, "got 'standard' with 'tanh-relu'"),
        ({"architecture": "jumprelu"}, {}, "must hold threshold, as the architecture 'jumprelu'"),
        ({"architecture": "gated"}, {}, "must hold b_gate.*it holds W_dec, W_enc, b_dec, b_enc"),
        ({"architecture": "topk"}, {}, "config of a topk dictionary must say k.*cfg.json"),
        ({"architecture": "topk", "k": 99}, {}, "k must be between 1 and its 16 features; got 99"),
        ({"normalize_activations": "covariance_whitening"}, {}, "one of none, constant.*got 'cova"),
        ({"d_sae": 99}, {}, r"W_enc must be \[d_in, d_sae\] = \[6, 99\].*go together"),
        ({}, {"W_enc": drawn(F, D)}, r"= \[6, 16\] by its config; got \[16, 6\]; transpose it"),
        ({}, {"W_dec": None}, "must hold W_dec, as the architecture 'standard' has it"),
        ({}, {"b_dec": torch.full((D,), torch.nan)}, "must be finite; b_dec holds 6 NaN or inf"),
        (
            {},
            {"W_enc": drawn(D, F) / 0},
            "must be finite; W_enc holds 96 NaN or infinite numbers o",
        ),
        ({}, {"scaling_factor": drawn(F)}, "must come with finetuning_scaling_factor: true"),
        ({"architecture": "transcoder"}, {}, "only an autoencoder can subtract b_dec"),
        (
            {"architecture": "skip_transcoder", "apply_b_dec_to_input": False},
            {},
            "must hold W_skip",
        ),
    ],
)
def test_broken_folders_of_saelens(
    config: dict[str, Any], change: dict[str, Any], text: str, tmp_path: Path
) -> None:
    tensors = {n: t for n, t in (plain() | change).items() if t is not None}
    folder = saelens(tmp_path / "sae", six("standard") | config, tensors)
    with pytest.raises(ValueError, match=text) as caught:
        load_dictionary(folder)
    assert str(folder) in str(caught.value)


def test_a_scale_is_refused_where_none_is_wanted(tmp_path: Path) -> None:
    config = six("standard", normalize_activations="layer_norm")
    folder = saelens(tmp_path / "sae", config, plain())
    with pytest.raises(
        ValueError, match="`scale` must be for an autoencoder.*got 2 for layer_norm"
    ):
        load_dictionary(folder, scale=2.0)
    folder = learned_folder(tmp_path / "ae", *learned("AutoEncoderNew"))
    with pytest.raises(
        ValueError, match="`scale` must be for a folder of SAELens; got one for dic"
    ):
        load_dictionary(folder, scale=2.0)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="must be a file or folder of a dictionary; .*nothi"
    ):
        load_dictionary(tmp_path / "no")
    with pytest.raises(ValueError, match=r"must hold one of sae_weights.*got an empty folder"):
        load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(six("standard")))
    with pytest.raises(
        FileNotFoundError, match="sae_weights.safetensors' must be a file.*cfg.json"
    ):
        load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="cfg.json' must hold a JSON object of settings; got list"):
        load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="must hold a JSON object of settings; got Expecting"):
        load_dictionary(tmp_path)
    folder = learned_folder(tmp_path / "ae", *learned("AutoEncoderNew"))
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json' must be a file of a dictionary"):
        load_dictionary(folder)
    (tmp_path / "other.bin").write_text("x")
    with pytest.raises(ValueError, match="got other.bin; name the folder"):
        load_dictionary(tmp_path / "other.bin")


def test_files_that_are_none(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "sae", six("standard"), plain())
    (folder / "sae_weights.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="must be a whole .safetensors file; it cannot be read"):
        load_dictionary(folder)
    (tmp_path / "params.npz").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="must be a .npz file of plain arrays"):
        load_dictionary(tmp_path / "params.npz")
    folder = learned_folder(tmp_path / "ae", *learned("AutoEncoderNew"))
    (folder / "ae.pt").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="must be a state dict of tensors alone; got"):
        load_dictionary(folder)


class Mischief:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    made_by_code = tmp_path / "made"
    np.savez(tmp_path / "params.npz", W_enc=np.array([Mischief(made_by_code)], dtype=object))
    with pytest.raises(ValueError, match="plain arrays; it cannot be read without unpickling"):
        load_dictionary(tmp_path / "params.npz")
    state, trainer = learned("AutoEncoderNew")
    folder = learned_folder(tmp_path / "ae", state, trainer)
    torch.save(state | {"more": Mischief(made_by_code)}, folder / "ae.pt")
    with pytest.raises(ValueError, match="is code, which is not run"):
        load_dictionary(folder)
    torch.save([1, 2], folder / "ae.pt")
    with pytest.raises(ValueError, match="a state dict of tensors alone; got list"):
        load_dictionary(folder)
    assert not made_by_code.exists()


def test_files_that_vanish(tmp_path: Path) -> None:
    for read, name in (
        (gemma_scope.load_first, "params.npz"),
        (gemma_scope.load_second, "params.safetensors"),
        (circuit_tracer.load, "layer_0.safetensors"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{name}' must be a file.*; beside it lie no"):
            read(tmp_path / "no" / name)
    folder = learned_folder(tmp_path / "ae", *learned("AutoEncoderNew"))
    (folder / "ae.pt").unlink()
    with pytest.raises(FileNotFoundError, match="ae.pt' must hold the weights; there is no such"):
        dictionary_learning.load(folder)


def test_an_autoencoder_of_unit_rows_is_taken_as_it_is(tmp_path: Path) -> None:
    state, trainer = learned("AutoEncoder")
    state["decoder.weight"] = torch.nn.functional.normalize(state["decoder.weight"], dim=0)
    found = load_dictionary(learned_folder(tmp_path / "ae", state, trainer))
    assert torch.equal(found.w_enc, state["encoder.weight"].T)


def test_transcoders_of_gemma_scope_without_a_layer_say_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-transcoders"
    folder.mkdir()
    arrays = {n: t.numpy() for n, t in (plain(OUT) | {"threshold": thresholds()}).items()}
    np.savez(folder / "params.npz", **arrays)
    found = load_dictionary(folder)
    assert (found.reads, found.writes, found.is_transcoder) == ("", "", True)
    with pytest.raises(ValueError, match="'nothing' and 'nothing'"):
        found.must_fit("L3.mlp", D, OUT)


def test_a_file_of_circuit_tracer_without_a_layer_says_nothing(tmp_path: Path) -> None:
    t = plain(OUT)
    save_file(t | {"W_enc": t["W_enc"].T.contiguous()}, tmp_path / "layer_x.safetensors")
    found = load_dictionary(tmp_path)
    assert (found.reads, found.writes, found.is_transcoder) == ("", "", True)


def test_broken_gemma_scope(tmp_path: Path) -> None:
    tensors = {n.lower(): t for n, t in (plain() | {"threshold": thresholds()}).items()}
    path = tmp_path / "params.safetensors"
    save_file(tensors | {"w_dec": drawn(F, 3, D)}, path)
    with pytest.raises(ValueError, match=r"must be a matrix \[feature, d_out\]; got \[16, 3, 6\]"):
        load_dictionary(path)
    save_file(tensors | {"more": drawn(2)}, path)
    with pytest.raises(ValueError, match="must hold nothing but.*; got more too"):
        load_dictionary(path)
    save_file({n: t for n, t in tensors.items() if n != "threshold"}, path)
    with pytest.raises(ValueError, match="must hold threshold or THRESHOLD, as a JumpReLU dict"):
        load_dictionary(path)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in tensors.items()})
    with pytest.raises(ValueError, match="of embeddings without the model's factor √d_model"):
        load_dictionary(folder).must_fit("L0.resid", D, D)


def test_broken_dictionary_learning(tmp_path: Path) -> None:
    state, trainer = learned("AutoEncoderTopK")
    folder = learned_folder(tmp_path / "ae", state, trainer | {"dict_class": "CrossCoder"})
    with pytest.raises(ValueError, match="dict_class must be one of AutoEncoder.*got 'CrossCoder'"):
        load_dictionary(folder)
    learned_folder(folder, state, trainer | {"k": 9})
    with pytest.raises(ValueError, match="must agree on k; got 9 and 4"):
        load_dictionary(folder)
    del state["k"], trainer["k"]
    learned_folder(folder, state, trainer)
    with pytest.raises(ValueError, match="must agree on k; got None and None"):
        load_dictionary(folder)
    del state["b_dec"]
    learned_folder(folder, state, trainer | {"k": 4})
    with pytest.raises(ValueError, match="must hold b_dec or bias or decoder_bias or decoder.bias"):
        load_dictionary(folder)


def test_broken_circuit_tracer(tmp_path: Path, unchecked: None) -> None:
    t = plain(OUT)
    stored = t | {"W_enc": t["W_enc"].T.contiguous()}
    path = tmp_path / "layer_3.safetensors"
    save_file({"W_enc_3": stored["W_enc"], "b_enc_3": stored["b_enc"]}, path)
    with pytest.raises(ValueError, match="got W_enc_3, b_enc_3, a cross-layer transcoder"):
        load_dictionary(path)
    save_file(stored | {"log_threshold": thresholds()}, path)
    with pytest.raises(ValueError, match="got log_threshold too, so it is of another kind"):
        load_dictionary(path)
    save_file(t, path)
    with pytest.raises(ValueError, match=r"w_enc must be \[6, 16\].*got \[16, 6\]; transpose it"):
        load_dictionary(path)
    save_file(stored, path)
    (tmp_path / "config.yaml").write_text("activation: topk\n")
    with pytest.raises(
        ValueError, match="a topk transcoder must say k; neither it nor config.yaml"
    ):
        load_dictionary(path)
    (tmp_path / "config.yaml").write_text("activation: topk\nk: 3\n")
    activation = load_dictionary(path).activation
    assert isinstance(activation, TopK) and activation.k == 3
    (tmp_path / "config.yaml").write_text("activation: relu\n")
    assert isinstance(load_dictionary(path).activation, Relu)
    (tmp_path / "config.yaml").write_text("feature_input_hook: hook_mlp_in\n")
    with pytest.raises(ValueError, match="must say where it reads without doubt.*hook_mlp_in"):
        load_dictionary(path).must_fit("L3.mlp", D, OUT)
    save_file(stored, tmp_path / "layer_4.safetensors")
    with pytest.raises(
        ValueError, match="must be the file of one layer; it holds those of 2 layers"
    ):
        load_dictionary(tmp_path)
