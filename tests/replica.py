"""Transformers written a second time, slowly, in float64, with every rule as a detach.

Nothing here uses the package's propagation: a rule is expressed in the forward pass by writing the
operation as `coefficient.detach() * x`, so that plain autograd yields the coefficient that the
paper asks for. Every operation is a method, so that a publication's own wording of its rules can
replace ours. Readers' inputs can be given one by one, which the package never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relp.rulebook import Rules

Reader = Callable[[str, Tensor], Tensor]
"""From a reader's name and the residual stream to what that reader gets."""


def everything(_: str, residual: Tensor) -> Tensor:
    return residual


@dataclass
class Trace:
    """The tensors of one run, by the package's site names, and what each writer added."""

    sites: dict[str, Tensor]
    writers: dict[str, Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Layout:
    """What a Hugging Face model calls its parts, those of a block below the block's name."""

    embed: str
    block: str
    final: str
    attention: str
    out: str
    norms: tuple[str, str]
    """What attention and MLP read through."""
    mlp: tuple[str, ...]
    """(in, out), or (gate, up, down)."""


LLAMA = Layout(
    "model.embed_tokens", "model.layers", "model.norm", "self_attn", "o_proj",
    ("input_layernorm", "post_attention_layernorm"), ("gate_proj", "up_proj", "down_proj"),
)  # fmt: skip
LAYOUTS = {
    "gpt2": Layout(
        "transformer.wte", "transformer.h", "transformer.ln_f", "attn", "c_proj",
        ("ln_1", "ln_2"), ("c_fc", "c_proj"),
    ),
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gpt_neox": Layout(
        "gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", "attention", "dense",
        ("input_layernorm", "post_attention_layernorm"), ("dense_h_to_4h", "dense_4h_to_h"),
    ),
}  # fmt: skip
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    # y / x of the activation
    "gelu_new": lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: 1 / (1 + torch.exp(-x)),
}


class Replica:
    """A transformer from the state dict of a Hugging Face GPT-2, Llama, Qwen3 or GPT-NeoX model."""

    def __init__(self, model: Any, rules: Rules) -> None:
        hf = model.original_model
        self.config = hf.config
        self.layout = LAYOUTS[self.config.model_type]
        self.parallel = getattr(self.config, "use_parallel_residual", False)
        self.rules = rules
        # the bridge renames modules; a fresh model of the same config knows the plain names
        names = type(hf)(hf.config).state_dict().keys()
        plain = {n.replace("_original_component.", ""): p for n, p in hf.state_dict().items()}
        self.p = {n: plain[n].double() for n in names if n in plain}
        self.layers = self.config.num_hidden_layers
        self.heads = self.config.num_attention_heads
        self.kv_heads = getattr(self.config, "num_key_value_heads", self.heads)
        self.d_head = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.heads
        )
        self.eps = next(
            getattr(self.config, n)
            for n in ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
            if hasattr(self.config, n)
        )

    # -- operations, with rules as detaches ------------------------------------------------------

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return x @ w if bias is None else x @ w + bias

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.p[f"{name}.weight"], self.p.get(f"{name}.bias")
        centred = x if bias is None else x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        if self.rules.norm == "constant":
            scale = scale.detach()
        out = centred / scale * weight
        return out if bias is None else out + bias

    def gate(self, x: Tensor) -> Tensor:
        """The activation over its input."""
        name = getattr(self.config, "activation_function", None) or self.config.hidden_act
        return GATES[name](x)

    def activation(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return x * (gate.detach() if self.rules.activation == "identity" else gate)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.rules.gate == "half":
            return (a * b.detach() + a.detach() * b) / 2
        return a * b

    def bilinear(self, a: Tensor, b: Tensor) -> Tensor:
        if self.rules.bilinear == "half" and a.requires_grad:  # (a constant pattern is a weight)
            return (a @ b.detach() + a.detach() @ b) / 2
        return a @ b

    def softmax(self, scores: Tensor) -> Tensor:
        pattern = scores.softmax(-1)
        if self.rules.softmax == "softer":  # the value of one, the derivative of the other
            warm = (scores / 2).softmax(-1)
            return pattern.detach() + 2 * (warm - warm.detach())
        return pattern.detach() if self.rules.softmax == "constant" else pattern

    def rotate(self, x: Tensor) -> Tensor:
        rope = getattr(self.config, "rope_parameters", None)
        if rope is None:
            return x
        half = int(self.d_head * rope.get("partial_rotary_factor", 1)) // 2
        frequency = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.double) / half)
        angle = torch.arange(x.shape[1], dtype=torch.double)[:, None] * frequency
        a, b, rest = x.tensor_split((half, 2 * half), -1)
        turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
        return torch.cat([*turned, rest], -1)

    # -- the model -------------------------------------------------------------------------------

    def run(
        self,
        tokens: Tensor,
        root: Tensor | None = None,
        read: Reader = everything,
        writers: dict[str, Tensor] | None = None,
    ) -> Trace:
        """One forward pass; `root` replaces block 0's input, `writers` is filled on the way."""
        embed = self.p[f"{self.layout.embed}.weight"]
        if root is None:
            root = embed[tokens]
            if "transformer.wpe.weight" in self.p:
                root = root + self.p["transformer.wpe.weight"][: tokens.shape[1]]
        x = root
        sites: dict[str, Tensor] = {}
        writers = {} if writers is None else writers
        writers["embed"] = root
        for layer in range(self.layers):
            sites[f"L{layer}.resid"] = before = x
            x = self.add(x, self.attention(layer, x, sites, writers, read))
            sites[f"L{layer}.mid"] = x
            added = self.mlp(layer, read(f"L{layer}.mlp.in", before if self.parallel else x))
            sites[f"L{layer}.mlp"] = writers[f"L{layer}.mlp"] = added
            x = self.add(x, added)
        sites["final"] = x
        x = self.norm(read("logits.in", x), self.layout.final)
        return Trace(sites, writers, self.linear(x, self.p["lm_head.weight"].T, None))

    def weights(self, layer: int, part: str) -> tuple[Tensor, Tensor | None]:
        """Weight `[in, out]` and bias of a linear part of a block."""
        name = f"{self.layout.block}.{layer}.{part}"
        w = self.p[f"{name}.weight"]
        return w if self.config.model_type == "gpt2" else w.T, self.p.get(f"{name}.bias")

    def attention(
        self,
        layer: int,
        x: Tensor,
        sites: dict[str, Tensor],
        writers: dict[str, Tensor],
        read: Reader,
    ) -> Tensor:
        length, d = x.shape[1], self.d_head
        grouped = self.kv_heads != self.heads
        mixed = []
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        for h in range(self.heads):
            g = h * self.kv_heads // self.heads
            owner = f"L{layer}KV{g}" if grouped else f"L{layer}H{h}"
            q = self.rotate(self.project(layer, "q", h, read(f"L{layer}H{h}.q", x)))
            k = self.rotate(self.project(layer, "k", g, read(f"{owner}.k", x)))
            v = self.project(layer, "v", g, read(f"{owner}.v", x))
            scores = self.scale(self.bilinear(q, k.mT), d**-0.5).masked_fill(~mask, -math.inf)
            mixed.append(self.bilinear(self.softmax(scores), v))
        z = torch.cat(mixed, -1)
        sites[f"L{layer}.z"] = z
        w, bias = self.weights(layer, f"{self.layout.attention}.{self.layout.out}")
        for h in range(self.heads):
            rows = slice(h * d, (h + 1) * d)
            writers[f"L{layer}H{h}"] = z[..., rows] @ w[rows]
        sites[f"L{layer}.attn"] = out = self.linear(z, w, bias)
        return out

    def project(self, layer: int, slot: str, head: int, x: Tensor) -> Tensor:
        block, inside = f"{self.layout.block}.{layer}", self.layout.attention
        x = self.norm(x, f"{block}.{self.layout.norms[0]}")
        which = "qkv".index(slot)
        if self.layout is LLAMA:
            (w, bias), at = self.weights(layer, f"{inside}.{slot}_proj"), head
        elif self.config.model_type == "gpt2":  # all queries, all keys, all values
            (w, bias), at = self.weights(layer, f"{inside}.c_attn"), which * self.heads + head
        else:  # a head's query, key and value side by side
            (w, bias), at = self.weights(layer, f"{inside}.query_key_value"), head * 3 + which
        columns = slice(at * self.d_head, (at + 1) * self.d_head)
        x = self.linear(x, w[:, columns], None if bias is None else bias[columns])
        name = f"{block}.{inside}.{slot}_norm"
        return self.norm(x, name) if f"{name}.weight" in self.p else x

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        x = self.norm(x, f"{self.layout.block}.{layer}.{self.layout.norms[1]}")
        first, *second, last = (self.weights(layer, f"mlp.{part}") for part in self.layout.mlp)
        hidden = self.activation(self.linear(x, *first))
        if second:
            hidden = self.product(hidden, self.linear(x, *second[0]))
        return self.linear(hidden, *last)

    def coefficients(self, task: Any, side: str) -> dict[str, Tensor]:
        """d metric / d site on one side, under the rules."""
        trace = self.differentiable(task, side)
        names = [n for n in trace.sites if not n.endswith(".mid")]
        metric = task.metric(trace.logits).sum()
        grads = torch.autograd.grad(metric, [trace.sites[n] for n in names])
        return dict(zip(names, grads, strict=True))

    def differentiable(self, task: Any, side: str) -> Trace:
        """A run whose graph begins at block 0's input."""
        tokens = getattr(task, side)
        with torch.no_grad():
            root = self.run(tokens).writers["embed"]
        return self.run(tokens, root.requires_grad_())


# -- rules of linear layers, one entry at a time ---------------------------------------------------


def epsilon_rule(x: Tensor, w: Tensor, bias: Tensor | None, g: Tensor, *, epsilon: float) -> Tensor:
    """Coefficients at `x` `[in]` of z = x w + b under LRP-ε, from `g` at z; `w` is `[in, out]`.

    R_i = Σ_j x_i w_ij R_j / (z_j + ε sgn z_j) with sgn 0 = 1 (Bach et al. 2015; zennit's
    `Epsilon`), so that with R = z·g at the output, c_i = Σ_j w_ij g_j z_j / (z_j + ε sgn z_j).
    """
    c = torch.zeros_like(x)
    for j in range(w.shape[1]):
        z = sum(float(x[i] * w[i, j]) for i in range(len(x))) + _entry(bias, j)
        for i in range(len(x)):
            c[i] += float(w[i, j]) * float(g[j]) * z / _stabilised(z, epsilon)
    return c


def gamma_rule(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    g: Tensor,
    *,
    gamma: float,
    epsilon: float,
    raise_bias: bool,
) -> Tensor:
    """Coefficients at `x` under the generalised LRP-γ, from `g` at z = x w + b.

    R_i = Σ_j (x_i w_ij + γ (x_i w_ij)⁺) R_j / D_j with D_j = z_j + γ (Σ_i (x_i w_ij)⁺ + b_j⁺) where
    z_j > 0, negative parts where z_j < 0, nothing where z_j = 0; D is stabilised as in
    `epsilon_rule` (Montavon et al. 2019; Andéol et al. 2021, arXiv:2106.04923; zennit's `Gamma`).
    Divided by x_i; an entry x_i = 0 has no contribution whose sign could count. Without
    `raise_bias` the term b_j⁺ is left out.
    """
    c = torch.zeros_like(x)
    for j in range(w.shape[1]):
        parts = [float(x[i] * w[i, j]) for i in range(len(x))]
        z = sum(parts) + _entry(bias, j)
        if z == 0:
            continue
        sign = 1 if z > 0 else -1
        raised = [*parts, _entry(bias, j)] if raise_bias else parts
        favoured = [p for p in raised if sign * p > 0]
        share = float(g[j]) * z / _stabilised(z + gamma * sum(favoured), epsilon)
        for i, part in enumerate(parts):
            c[i] += share * float(w[i, j]) * (1 + gamma if sign * part > 0 else 1)
    return c


def _entry(bias: Tensor | None, j: int) -> float:
    return 0.0 if bias is None else float(bias[j])


def _stabilised(z: float, epsilon: float) -> float:
    return z + epsilon if z >= 0 else z - epsilon
