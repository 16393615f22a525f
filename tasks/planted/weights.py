"""From rows to a model of transformers: norms made near affine, noise and distractors added.

**Norms.** Every token carries a ballast in two coordinates, `one` (+300) and `twin` (-300), beside
which features of size 1 hardly change the mean square; and whatever is written to the stream is
taken from `rest`, so that its mean stays 0. LayerNorm and RMSNorm then divide by a constant, which
their weights undo: readers get the features as they are, and `one` as 1.

**Rotary positions** (Llama) turn the first pair of each head's coordinates, which stay empty, and
with a base of 1e30 next to nothing else: its heads do not know where a token stands.

**Noise** of 0.1 adds to each kind of matrix (queries, ..., logits; all layers together) normal
numbers of a tenth of its root mean square. A kind that is empty stays so.

**Distractors** are further heads, layer after layer, that read words by random matrices and write
to coordinates that they alone read, and the logits faintly: active, different between clean and
corrupt, and of less than a hundredth of the circuit's consequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tasks.planted.stream import SERVICE, Head, Neuron, Rows, Stream

__all__ = ["SPECIAL", "Wiring", "transformer"]

SPECIAL = ("<bos>", "<unk>")
BALLAST = 300.0
CORNER = 40.0
"""How much larger a neuron's input is than what it reads: that narrow is its corner."""
SPARE = 4
"""Coordinates that distractors write to."""
RANDOM = 0.6
"""Of the entries of what distractors read: scores of about 1, attention that is not even."""
FAINT = 0.02
"""Of what the logits read there: without it, an estimate of 1e-9 would still be the largest."""
LAYERS, HEADS = 2, 4
"""Layers, and heads in each, at least; those that nothing is said of are idle."""
CONTEXT = 16
ROTARY_BASE = 1e30
HEAD_KINDS = ("query", "key", "value", "out")


@dataclass(frozen=True, eq=False)
class Wiring:
    """A transformer in rows of its stream.

    Every word writes its coordinate of `token`, if it has one, and what `says` adds; position `i`
    that of `place`, if there is such a group (GPT-2 alone has positions to write).
    """

    architecture: str
    """`gpt2` or `llama`."""
    stream: Stream
    heads: Sequence[Head]
    logits: Mapping[str, Rows]
    """What the logit of each word reads."""
    neurons: Sequence[Neuron] = ()
    says: Mapping[str, Rows] = field(default_factory=dict)
    group: int = 1
    """Query heads that share a key/value head (Llama)."""

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, in the order of the token ids."""
        return (*SPECIAL, *map(str, self.stream.labels["token"]))

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        used = [*(h.at[0] for h in self.heads), *(n.layer for n in self.neurons)]
        return max(LAYERS, 1 + max(used))


@dataclass(frozen=True)
class _Shape:
    """The sizes of the model that holds a wiring and its distractors."""

    layers: int
    heads: int
    groups: int
    d_head: int
    d_model: int
    features: int
    """Coordinates that mean something; the next `SPARE` are the distractors'."""
    used: tuple[int, ...]
    """The coordinates of a head that may hold something."""

    @classmethod
    def of(cls, wiring: Wiring, distractors: int) -> _Shape:
        named = 1 + max(h.at[1] for h in wiring.heads)
        heads = max(HEADS, named, math.ceil((len(wiring.heads) + distractors) / wiring.layers))
        heads += -heads % wiring.group
        rows = max(max(len(h.query), len(h.value)) for h in wiring.heads)
        width = wiring.stream.width + SPARE
        if wiring.architecture == "gpt2":  # its heads share the width out among themselves
            d_head = max(rows, math.ceil(width / heads))
            d_model, used = heads * d_head, tuple(range(d_head))
        else:
            d_head, d_model = 2 * math.ceil(rows / 2 + 1), width + -width % heads
            used = tuple(i for i in range(d_head) if i % (d_head // 2))
        return cls(wiring.layers, heads, heads // wiring.group, d_head, d_model,
                   wiring.stream.width, used)  # fmt: skip


Weights = dict[str, Float[Tensor, "*part row d_model"]]
"""By kind; rows of all layers and heads together, as they read and write the stream."""


def transformer(
    wiring: Wiring, *, noise: float = 0.0, distractors: int = 0, seed: int = 0
) -> PreTrainedModel:
    """The model of a wiring, in float32 and eval mode; transformers draws from the global state."""
    shape = _Shape.of(wiring, distractors)
    generator = torch.Generator().manual_seed(seed)
    weights = _wired(wiring, shape)
    _distract(weights, shape, wiring, distractors, generator)
    for kind in ("embed", "places", "out", "writes"):
        weights[kind][..., SERVICE.index("rest")] -= weights[kind].sum(-1)
    for kind, matrix in weights.items():
        size = noise * matrix.square().mean().sqrt()
        weights[kind] = matrix + size * torch.randn(matrix.shape, generator=generator)
    weights["embed"][:, SERVICE.index("one")] += BALLAST
    weights["embed"][:, SERVICE.index("twin")] -= BALLAST
    made = {"gpt2": _gpt2, "llama": _llama}[wiring.architecture]
    return made(wiring, shape, weights).eval()


def _wired(wiring: Wiring, shape: _Shape) -> Weights:
    """The matrices as the wiring says."""
    stream, words = wiring.stream, wiring.words
    inner = max((sum(n.layer == i for n in wiring.neurons) for i in range(shape.layers)), default=0)
    by_head = (shape.layers, shape.heads, shape.d_head, shape.d_model)
    by_neuron = (shape.layers, max(inner, 1), shape.d_model)
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(HEAD_KINDS, by_head)
    sizes |= {"reads": by_neuron, "writes": by_neuron}
    sizes |= {"embed": (len(words), shape.d_model), "places": (CONTEXT, shape.d_model)}
    sizes["logits"] = sizes["embed"]
    found = {kind: torch.zeros(size) for kind, size in sizes.items()}
    width, nothing = stream.width, torch.zeros(1, stream.width)
    for i, word in enumerate(words):
        own = stream["token", word] if word in stream.labels["token"] else nothing
        found["embed"][i, :width] = own + wiring.says.get(word, nothing)
        found["logits"][i, :width] = wiring.logits.get(word, nothing)
    if "place" in stream.labels:
        found["places"][: len(stream["place"]), :width] = stream["place"]
    for head in wiring.heads:
        half = math.sqrt(head.sharpness * math.sqrt(shape.d_head))  # of the scores, in q and in k
        rows = (half * head.query, half * head.key, head.value, head.out)
        for kind, some in zip(HEAD_KINDS, rows, strict=True):
            found[kind][head.at][list(shape.used[: len(some)]), :width] = some
    for layer in range(shape.layers):
        for i, neuron in enumerate(n for n in wiring.neurons if n.layer == layer):
            found["reads"][layer, i, :width] = CORNER * neuron.reads
            found["writes"][layer, i, :width] = neuron.writes / CORNER
    return found


def _distract(
    weights: Weights, shape: _Shape, wiring: Wiring, count: int, generator: torch.Generator
) -> None:
    """Fills idle heads; where key and value head are taken, only what is done with them."""
    taken = {h.at for h in wiring.heads}
    places = product(range(shape.heads), range(shape.layers))  # layer after layer
    idle = [(layer, number) for number, layer in places if (layer, number) not in taken]
    spare = list(range(shape.features, shape.features + SPARE))
    read = [*wiring.stream["token"].argmax(1).tolist(), *spare]
    for layer, number in idle[:count]:
        served = {n // wiring.group for at, n in taken if at == layer}
        kinds = HEAD_KINDS if number // wiring.group not in served else ("query", "out")
        for kind in kinds:
            columns = spare if kind == "out" else read
            size = 2 / math.sqrt(shape.d_head * count) if kind == "out" else RANDOM
            rows = size * torch.randn(shape.d_head, len(columns), generator=generator)
            weights[kind][layer, number][:, columns] = rows
    if count:
        faint = torch.randn(len(wiring.words), SPARE, generator=generator)
        weights["logits"][:, spare] = FAINT * faint


# -- into transformers' models ---------------------------------------------------------------------


def _fill(module: Any, weight: Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(weight)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()


def _scale(shape: _Shape) -> Float[Tensor, " d_model"]:
    """The weight of every norm: what it divides by, and the ballast in units of itself."""
    scale = torch.full((shape.d_model,), BALLAST * math.sqrt(2 / shape.d_model))
    scale[: len(SERVICE)] = torch.tensor([scale[0] / BALLAST, 0.0, 0.0])
    return scale


def _gpt2(wiring: Wiring, shape: _Shape, weights: Weights) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=len(wiring.words), n_positions=CONTEXT, n_embd=shape.d_model,
        n_layer=shape.layers, n_head=shape.heads, n_inner=weights["reads"].shape[1],
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    _fill(model.transformer.wte, weights["embed"])
    _fill(model.transformer.wpe, weights["places"])
    _fill(model.lm_head, weights["logits"])
    _fill(model.transformer.ln_f, _scale(shape))
    for i, block in enumerate(model.transformer.h):
        joined = {kind: weights[kind][i].flatten(0, 1) for kind in HEAD_KINDS}
        _fill(block.attn.c_attn, torch.cat([joined[k] for k in HEAD_KINDS[:3]]).T)
        _fill(block.attn.c_proj, joined["out"])
        _fill(block.mlp.c_fc, weights["reads"][i].T)
        _fill(block.mlp.c_proj, weights["writes"][i])
        for norm in (block.ln_1, block.ln_2):
            _fill(norm, _scale(shape))
    return model


def _llama(wiring: Wiring, shape: _Shape, weights: Weights) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(wiring.words), max_position_embeddings=CONTEXT, hidden_size=shape.d_model,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, head_dim=shape.d_head,
        num_key_value_heads=shape.groups, intermediate_size=weights["reads"].shape[1],
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    _fill(model.model.embed_tokens, weights["embed"])
    _fill(model.lm_head, weights["logits"])
    _fill(model.model.norm, _scale(shape))
    one = torch.zeros(shape.d_model)
    one[SERVICE.index("one")] = 1.0
    for i, block in enumerate(model.model.layers):
        joined = {kind: weights[kind][i].flatten(0, 1) for kind in ("query", "out")}
        joined |= {
            kind: weights[kind][i, :: wiring.group].flatten(0, 1) for kind in ("key", "value")
        }
        _fill(block.self_attn.q_proj, joined["query"])
        _fill(block.self_attn.k_proj, joined["key"])
        _fill(block.self_attn.v_proj, joined["value"])
        _fill(block.self_attn.o_proj, joined["out"].T)
        _fill(block.mlp.gate_proj, weights["reads"][i])
        _fill(block.mlp.up_proj, one.expand_as(weights["reads"][i]))  # the gate alone decides
        _fill(block.mlp.down_proj, weights["writes"][i].T)
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            _fill(norm, _scale(shape))
    return model
