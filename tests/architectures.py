"""Tiny random models of the architectures in use, and what the rules make of each.

`python tests/architectures.py` prints the table; with `--write` it goes to `docs/coverage.md`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from conftest import boot, save_tokenizer, warm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from relp import CP_LRP, DEEPLIFT, RELP, Rules, propagate

VOCABULARY, TOKENS = 100, 6


@dataclass(frozen=True)
class Architecture:
    """How to make a model and what to feed it."""

    name: str
    build: Callable[[Path], nn.Module]
    """The folder is for those that come through the hub's layout."""
    inputs: Callable[[torch.Generator], dict[str, Any]]
    decoder_only: bool = False
    """Language models, booted as a `TransformerBridge`."""


# -- the table -------------------------------------------------------------------------------------

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**WIDE, "intermediate_size": 48}
GROUPED = {**GATED, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    **GATED, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}

DECODERS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},  # parallel, one norm
    "GPTNeoX": {**GATED},  # parallel, two norms
    "OPT": {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi, its own GELU
    "Falcon": {**WIDE},  # parallel, multi-query
    "Phi": {**GATED},
    "Phi3": {**GROUPED},
    "Llama": {**GROUPED},
    "Mistral": {**GROUPED},
    "Mixtral": {**GROUPED, **EXPERTS},  # router, experts
    "Qwen2": {**GROUPED},
    "Qwen3": {**GROUPED, "head_dim": 8},  # QK-norm
    "Qwen3Moe": {
        **GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "Gemma": {**GATED, "num_key_value_heads": 1, "head_dim": 8},
    "Gemma2": {**GROUPED, "head_dim": 8},  # post-norm, soft-caps
    "Gemma3": {**GROUPED, "head_dim": 8},  # post-norm, QK-norm
    "Olmo2": {**GATED},  # post-norm only
    "GptOss": {**GROUPED, **EXPERTS, "head_dim": 8},  # attention sinks, clamped experts
    "DeepseekV2": {**LATENT},  # latent attention, shared experts
    "DeepseekV3": {**LATENT},  # the same with a sigmoid router
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8},
    "Mamba2": {
        "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 8,
        "n_groups": 2, "chunk_size": 4,
    },
}  # fmt: skip


def tokens(generator: torch.Generator, count: int = TOKENS, rows: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, count), generator=generator)


def hub(name: str, head: str, **config: Any) -> Callable[[Path], nn.Module]:
    """A bridge, through a folder in the hub's layout."""

    def build(folder: Path) -> nn.Module:
        size = save_tokenizer(folder)
        kind = "Gemma3Text" if name == "Gemma3" else name
        plain = {"vocab_size": size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        made = getattr(transformers, f"{kind}Config")(**plain, **config)
        randomise(getattr(transformers, f"{name}{head}")(made)).save_pretrained(folder)
        return warm(boot(folder))

    return build


def plain(kind: str, config: Any) -> Callable[[Path], nn.Module]:
    """A module of transformers as it is."""
    return lambda _: randomise(getattr(transformers, kind)(config)).eval()


def randomise(model: Any) -> Any:
    """Weights of a size at which nothing is close to linear, biases and norms included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            size = 0.1 if p.dim() < 2 else max(p.shape[1:]) ** -0.5
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def vgg16(_: Path) -> nn.Module:
    """Configuration D of Simonyan & Zisserman 2014 (arXiv:1409.1556), 16 times narrower."""
    parts: list[nn.Module] = []
    width = 3
    for block, convolutions in zip((4, 8, 16, 32, 32), (2, 2, 3, 3, 3), strict=True):
        for _ in range(convolutions):
            parts += [nn.Conv2d(width, block, 3, padding=1), nn.ReLU(inplace=True)]
            width = block
        parts.append(nn.MaxPool2d(2))
    parts += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for size in (64, 64):
        parts += [nn.LazyLinear(size), nn.ReLU(inplace=True), nn.Dropout()]
    model = nn.Sequential(*parts, nn.LazyLinear(10)).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return randomise(model)


def image(*shape: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda g: {"pixel_values": torch.randn(1, *shape, generator=g)}


VISION = {**GATED, "image_size": 16, "patch_size": 8}
SPEECH = {
    **GATED, "vocab_size": 20, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def t5(kind: str) -> Any:
    return transformers.T5Config(
        **T5, vocab_size=VOCABULARY, feed_forward_proj=kind, decoder_start_token_id=0
    )


def both(g: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": tokens(g), "decoder_input_ids": tokens(g, 4)}


def flat(*shape: int, name: str = "input") -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda g: {name: torch.randn(*shape, generator=g)}


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in [
        *(
            Architecture(
                name,
                hub(name, "LMHeadModel" if name == "GPT2" else "ForCausalLM", **config),
                lambda g: {"input": tokens(g)},
                decoder_only=True,
            )
            for name, config in DECODERS.items()
        ),
        Architecture(
            "BERT", hub("Bert", "ForMaskedLM", **GATED), lambda g: {"input": tokens(g)}
        ),
        Architecture(
            "T5", hub("T5", "ForConditionalGeneration", **T5, decoder_start_token_id=0),
            lambda g: {"input": tokens(g), "decoder_input": tokens(g, 4)},
        ),
        Architecture(
            "RoBERTa", plain("RobertaForMaskedLM", transformers.RobertaConfig(**GATED, **TEXT)),
            lambda g: {"input_ids": tokens(g)},
        ),
        Architecture("Flan-T5", plain("T5ForConditionalGeneration", t5("gated-gelu")), both),
        Architecture(
            "Mamba (transformers)",
            plain("MambaForCausalLM", transformers.MambaConfig(**TEXT, **DECODERS["Mamba"])),
            lambda g: {"input_ids": tokens(g)},
            decoder_only=True,
        ),
        Architecture("VGG16", vgg16, flat(1, 3, 32, 32)),
        Architecture(
            "ResNet",
            plain(
                "ResNetForImageClassification",
                transformers.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=5
                ),
            ),
            image(3, 32, 32),
        ),
        Architecture(
            "EfficientNet",
            plain(
                "EfficientNetForImageClassification",
                transformers.EfficientNetConfig(
                    image_size=32, width_coefficient=0.25, depth_coefficient=1.0,
                    kernel_sizes=[3, 5], in_channels=[32, 32], out_channels=[32, 64], strides=[1, 2],
                    num_block_repeats=[1, 2], expand_ratios=[1, 4], hidden_dim=320, num_labels=5,
                ),
            ),
            image(3, 32, 32),
        ),
        Architecture(
            "ViT", plain("ViTForImageClassification", transformers.ViTConfig(**VISION)),
            image(3, 16, 16),
        ),
        Architecture(
            "SigLIP",
            plain(
                "SiglipModel",
                transformers.SiglipConfig(
                    text_config={**GATED, **TEXT, "projection_size": 32}, vision_config=VISION
                ),
            ),
            lambda g: {**image(3, 16, 16)(g), "input_ids": tokens(g, rows=2)},
        ),
        Architecture(
            "Wav2Vec2", plain("Wav2Vec2ForCTC", transformers.Wav2Vec2Config(**SPEECH)),
            flat(1, 200, name="input_values"),
        ),
        Architecture(
            "Whisper",
            plain(
                "WhisperForConditionalGeneration",
                transformers.WhisperConfig(
                    **TEXT, d_model=32, encoder_layers=2, decoder_layers=2, num_mel_bins=8,
                    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                    decoder_ffn_dim=48, max_source_positions=8, max_target_positions=16,
                    decoder_start_token_id=0,
                ),
            ),
            lambda g: {
                "input_features": torch.randn(1, 8, 16, generator=g),
                "decoder_input_ids": tokens(g, 4),
            },
        ),
        Architecture(
            "Pix2Struct",
            plain(
                "Pix2StructForConditionalGeneration",
                transformers.Pix2StructConfig(
                    text_config={
                        "vocab_size": VOCABULARY, "hidden_size": 32, "d_kv": 8, "d_ff": 48,
                        "num_layers": 2, "num_heads": 4, "is_decoder": True,
                    },
                    vision_config={
                        "hidden_size": 32, "patch_embed_hidden_size": 12, "d_ff": 48, "d_kv": 8,
                        "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 8,
                    },
                ),
            ),
            lambda g: {
                "flattened_patches": torch.cat(
                    [torch.arange(1.0, 5).expand(2, 4).T[None], torch.randn(1, 4, 12, generator=g)],
                    -1,
                ),
                "decoder_input_ids": tokens(g, 4),
            },
        ),
        Architecture("LSTM", lambda _: randomise(nn.LSTM(8, 8, 2, batch_first=True)).eval(),
                     flat(1, 5, 8)),
        Architecture(
            "TransformerEncoderLayer",
            lambda _: randomise(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)).eval(),
            flat(1, 5, 16, name="src"),
        ),
        Architecture(
            "MultiheadAttention",
            lambda _: randomise(nn.MultiheadAttention(16, 4, batch_first=True)).eval(),
            lambda g: {n: torch.randn(1, 5, 16, generator=g) for n in ("query", "key", "value")},
        ),
    ]
}  # fmt: skip


# -- the measurements ------------------------------------------------------------------------------


@contextmanager
def embedded(model: nn.Module) -> Iterator[list[Tensor]]:
    """What embeddings put out are leaves of the graph, in the order of their calls."""
    found: list[Tensor] = []

    def leaf(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    with ExitStack() as stack:
        # a bridge lists the parts that it knows; the model inside has them all
        for part in getattr(model, "original_model", model).modules():
            if isinstance(part, nn.Embedding):
                stack.callback(part.register_forward_hook(leaf).remove)
        yield found


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """A model's first output, and the leaves that it came from: float inputs and embeddings."""
    given = {
        k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()
    }
    with embedded(model) as found:
        out = model(**given)
    leaves = [v for v in given.values() if v.is_floating_point()] + found
    return (out if isinstance(out, Tensor) else out[0]), leaves


class Offsets(TorchFunctionMode):
    """Gives every operation's value at zero a leaf of its own: biases, constants, sigmoid(0).

    No rule hands these any relevance: what they keep is what conservation leaves out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(_carries(v) for v in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        # a quotient is linear in its numerator alone
        factors, others = (args[:1], args[1:]) if "div" in func.__name__ else (args, ())
        with torch.no_grad(), torch._C.DisableTorchFunction():
            offset = func(*tree_map(_zero, factors), *others, **tree_map(_zero, kwargs))
        out = func(*args, **kwargs)
        if _carries(out) and bool((offset != 0).any()):
            leaf = torch.zeros_like(offset).requires_grad_()
            self.found.append((leaf, offset))
            out = out.add_(leaf) if out is args[0] else out + leaf
        return out


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _zero(value: Any) -> Any:
    return torch.zeros_like(value) if _carries(value) else value


@dataclass(frozen=True)
class Measured:
    """What one model did under some rules."""

    same: bool
    """The forward pass gave what the model gives without rules, bit for bit."""
    operations: int
    covered: int
    conservation: float | None
    """|Σ x·c - (output - what biases keep)| / |output|, at the leaves."""
    completeness: float | None
    """|Σ Δx·c - Δoutput| / |Δoutput| between two inputs, for rules that compare them."""


def measure(model: nn.Module, architecture: Architecture, rules: Rules) -> Measured:
    """Runs the rules from a scalar, the difference of two outputs, to the leaves."""
    own, other = (
        architecture.inputs(torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    plain = run(model, own)[0].detach()
    high, low = plain.argmax(), plain.argmin()

    def scalar(out: Tensor) -> Tensor:
        return out.flatten()[high] - out.flatten()[low]

    with propagate(rules, root=model) as report:
        out, leaves = run(model, own)
    report.must_have_seen(out)
    completeness, conservation = None, None
    if rules.needs_reference:
        with report.reference():
            out_, leaves_ = run(model, other)
        grads = torch.autograd.grad(scalar(out), leaves, allow_unused=True)
        parts = zip(leaves, leaves_, grads, strict=True)
        total = sum(float(((b - a) * g).double().sum()) for a, b, g in parts if g is not None)
        gap = float(scalar(out_) - scalar(out))
        completeness = abs(total - gap) / abs(gap)
    else:
        offsets = Offsets()
        with propagate(rules, root=model), offsets:
            probed, leaves = run(model, own)
        roots = [*zip(leaves, leaves, strict=True), *offsets.found]
        grads = torch.autograd.grad(scalar(probed), [r for r, _ in roots], allow_unused=True)
        total = sum(
            float((x * g).double().sum())
            for (_, x), g in zip(roots, grads, strict=True)
            if g is not None
        )
        value = float(scalar(probed))
        conservation = abs(total - value) / abs(value)
    frame = report.to_dataframe()
    known = frame[frame.kind != "unknown"]
    return Measured(
        torch.equal(out, plain), int(frame["count"].sum()), int(known["count"].sum()),
        conservation, completeness,
    )  # fmt: skip
