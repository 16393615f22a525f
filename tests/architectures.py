"""Tiny random models of the architectures in use, and what the rules make of each.

`python tests/architectures.py` prints the table; with `--write` it goes to `docs/coverage.md`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
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

from relp import CP_LRP, DEEPLIFT, RELP, Rules, UnknownOperationError, propagate

VOCABULARY, TOKENS = 100, 6


@dataclass(frozen=True)
class Architecture:
    """How to make a model and what to feed it."""

    name: str
    make: Callable[[Path], nn.Module]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    bridge: bool = False
    """A `TransformerBridge`, else a plain module."""

    def build(self, folder: Path) -> Any:
        """The same model each time; bridges are booted from the folder, which then holds them."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make(folder)


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
        for name, p in model.named_parameters():
            if p.dim() < 2 and name.endswith("weight"):
                p.fill_(1)  # some start at zero
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
                bridge=True,
            )
            for name, config in DECODERS.items()
        ),
        Architecture(
            "BERT", hub("Bert", "ForMaskedLM", **GATED), lambda g: {"input": tokens(g)},
            bridge=True,
        ),
        Architecture(
            "T5", hub("T5", "ForConditionalGeneration", **T5, decoder_start_token_id=0),
            lambda g: {"input": tokens(g), "decoder_input": tokens(g, 4)},
            bridge=True,
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
                    kernel_sizes=[3, 5], in_channels=[32, 32], out_channels=[32, 64],
                    strides=[1, 2], num_block_repeats=[1, 2], expand_ratios=[1, 4],
                    hidden_dim=320, num_labels=5,
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
    dtype = next(model.parameters()).dtype
    given = {
        k: v.to(dtype, copy=True).requires_grad_() if v.is_floating_point() else v
        for k, v in inputs.items()
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
        self.leaves: list[Tensor] = []
        self.values: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(_carries(v) for v in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        # a quotient is linear in its numerator alone
        factors, others = (args[:1], args[1:]) if "div" in func.__name__ else (args, ())
        with torch.no_grad(), torch._C.DisableTorchFunction():
            offset = func(*tree_map(_zero, factors), *others, **tree_map(_zero, kwargs))
        out = func(*args, **kwargs)
        return tree_map(lambda o, b: self._probed(o, b, o is args[0]), out, offset)

    def sigmoid(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        """The same for a module, which is one operation for the rules."""
        return self._probed(output, torch.full_like(output.detach(), 0.5), in_place=False)

    def _probed(self, out: Any, offset: Any, in_place: bool) -> Any:
        if not _carries(out) or not bool((offset != 0).any()):
            return out
        leaf = torch.zeros_like(offset).requires_grad_()
        self.leaves.append(leaf)
        self.values.append(offset)
        return out.add_(leaf) if in_place else out + leaf


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _zero(value: Any) -> Any:
    return torch.zeros_like(value) if _carries(value) else value


@dataclass(frozen=True, eq=False)
class Measured:
    """What one model did under some rules."""

    same: bool
    """The forward pass gave what the model gives without rules, bit for bit."""
    operations: int
    """Calls of torch that carried relevance."""
    covered: int
    """Those that met a rule that knows them."""
    coefficients: Tensor
    """At all leaves, one after the other."""
    completeness: float | None
    """|Σ Δx·c + remainder - Δoutput| / |Δoutput| between two inputs, for rules that compare them;
    the remainder is reported with it: branches that one input alone takes."""


def measure(model: nn.Module, architecture: Architecture, rules: Rules) -> Measured:
    """Propagates the difference of two outputs back to the leaves."""
    own, other = (architecture.inputs(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with propagate(rules, root=model) as report:
        out, leaves = run(model, own)
        report.must_have_seen(out)
    if rules.needs_reference:
        with report.reference():
            out_, leaves_ = run(model, other)
    coefficients = differentiate(out, leaves)
    completeness = None
    if rules.needs_reference:
        steps = [b.detach() - a.detach() for a, b in zip(leaves, leaves_, strict=True)]
        gap = float(scalar(out_) - scalar(out.detach()))
        found = contributions(steps, coefficients) + float(report.remainder().remainder.sum())
        completeness = abs(found - gap) / abs(gap)
    frame = report.to_dataframe()
    return Measured(
        torch.equal(out, run(model, own)[0]),
        int(frame["count"].sum()),
        int(frame[frame.kind != "unknown"]["count"].sum()),
        torch.cat([c.flatten().float() for c in coefficients]),
        completeness,
    )


def conservation(model: nn.Module, architecture: Architecture, rules: Rules) -> float:
    """|Σ x·c + Σ offset·c - output| / |output|: how much relevance is lost, biases aside."""
    own = architecture.inputs(torch.Generator().manual_seed(0))
    offsets = Offsets()
    with ExitStack() as stack:
        for part in model.modules():
            if isinstance(part, nn.Sigmoid):
                stack.callback(part.register_forward_hook(offsets.sigmoid).remove)
        stack.enter_context(propagate(rules, root=model))
        stack.enter_context(offsets)
        out, leaves = run(model, own)
    coefficients = differentiate(out, [*leaves, *offsets.leaves])
    value = float(scalar(out.detach()))
    return abs(contributions([*leaves, *offsets.values], coefficients) - value) / abs(value)


def scalar(out: Tensor) -> Tensor:
    """A logit difference, of the last position where there are several."""
    return out.flatten()[-1] - out.flatten()[-2]


def differentiate(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Coefficients at leaves, zero where no relevance arrives."""
    return torch.autograd.grad(scalar(out), leaves, allow_unused=True, materialize_grads=True)


def contributions(values: list[Tensor], coefficients: Iterable[Tensor]) -> float:
    """Σ value · coefficient, in double precision."""
    pairs = zip(values, coefficients, strict=True)
    return sum(float((x.detach().double() * c.double()).sum()) for x, c in pairs)


# -- the table's numbers ---------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
ABOUT = """\
# Coverage

Tiny random models of each architecture (two layers, every weight, norm and bias random, float32).
`python tests/architectures.py --write` measures them and writes this page.

* through: a `TransformerBridge` booted from a saved folder, or the plain module.
* operations: calls of torch that carried relevance under RELP; covered: those with a rule.
* same: the forward pass under rules is bit for bit the model's own.
* conservation error: |Σ x·c + Σ b·c − output| / |output| under CP_LRP, over the inputs x
  (floating-point ones, outputs of embeddings) and the biases b (what each operation gives at zero).
* completeness error: |Σ Δx·c + remainder − Δoutput| / |Δoutput| under DEEPLIFT, for two
  random inputs; the remainder is what experts add that only one of the inputs is sent to.

The output is the difference of two logits.

"""


def table() -> pd.DataFrame:
    """One row per architecture."""
    rows = []
    for name, architecture in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = architecture.build(Path(folder))
        row = {"architecture": name, "through": "bridge" if architecture.bridge else "module"}
        try:
            one, two = (measure(model, architecture, rules) for rules in (RELP, DEEPLIFT))
        except UnknownOperationError:
            rows.append({**row, "covered": "refused"})
            continue
        row |= {
            "operations": str(one.operations),
            "covered": f"{one.covered / one.operations:.0%}",
            "same": "yes" if one.same and two.same else "no",
            "conservation error": f"{conservation(model, architecture, CP_LRP):.0e}",
            "completeness error": f"{two.completeness:.0e}",
        }
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a table of a Markdown page."""
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.to_numpy().tolist()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    found = table()
    print(found.to_string(index=False))
    if "--write" in sys.argv[1:]:
        PAGE.write_text(ABOUT + markdown(found))
