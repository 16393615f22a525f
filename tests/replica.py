"""GPT-2 and Llama written a second time, slowly, in float64, with every rule as a detach.

Nothing here uses the package's propagation: a rule is expressed in the forward pass by writing the
operation as `coefficient.detach() * x`, so that plain autograd yields the coefficient that the
paper asks for. Readers' inputs can be given one by one, which the package never does.
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


class Replica:
    """A transformer from the state dict of a Hugging Face GPT-2 or Llama model."""

    def __init__(self, model: Any, rules: Rules) -> None:
        hf = model.original_model
        self.config = hf.config
        self.llama = self.config.model_type == "llama"
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

    # -- rules as detaches -----------------------------------------------------------------------

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.llama:
            scale = (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
            centred = x
        else:
            centred = x - x.mean(-1, keepdim=True)
            scale = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        if self.rules.norm == "constant":
            scale = scale.detach()
        out = centred / scale * self.p[f"{name}.weight"]
        return out if self.llama else out + self.p[f"{name}.bias"]

    def activation(self, x: Tensor) -> Tensor:
        if self.llama:
            gate = 1 / (1 + torch.exp(-x))
        else:
            gate = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return x * (gate.detach() if self.rules.activation == "identity" else gate)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.rules.gate == "half":
            return (a * b.detach() + a.detach() * b) / 2
        return a * b

    def bilinear(self, a: Tensor, b: Tensor) -> Tensor:
        if self.rules.bilinear == "half" and a.requires_grad:  # (a constant pattern is a weight)
            return (a @ b.detach() + a.detach() @ b) / 2
        return a @ b

    # -- the model -------------------------------------------------------------------------------

    def run(
        self,
        tokens: Tensor,
        root: Tensor | None = None,
        read: Reader = everything,
        writers: dict[str, Tensor] | None = None,
    ) -> Trace:
        """One forward pass; `root` replaces block 0's input, `writers` is filled on the way."""
        length = tokens.shape[1]
        if root is None:
            if self.llama:
                root = self.p["model.embed_tokens.weight"][tokens]
            else:
                root = self.p["transformer.wte.weight"][tokens]
                root = root + self.p["transformer.wpe.weight"][:length]
        x = root
        sites: dict[str, Tensor] = {}
        writers = {} if writers is None else writers
        writers["embed"] = root
        for layer in range(self.layers):
            sites[f"L{layer}.resid"] = x
            x = x + self.attention(layer, x, sites, writers, read)
            sites[f"L{layer}.mid"] = x
            added = self.mlp(layer, read(f"L{layer}.mlp.in", x))
            sites[f"L{layer}.mlp"] = writers[f"L{layer}.mlp"] = added
            x = x + added
        sites["final"] = x
        x = self.norm(read("logits.in", x), "model.norm" if self.llama else "transformer.ln_f")
        unembed = self.p.get("lm_head.weight")
        if unembed is None:
            unembed = self.p[
                "model.embed_tokens.weight" if self.llama else "transformer.wte.weight"
            ]
        return Trace(sites, writers, x @ unembed.T)

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
            q = self.project(layer, "q", h, read(f"L{layer}H{h}.q", x))
            k = self.project(layer, "k", g, read(f"{owner}.k", x))
            v = self.project(layer, "v", g, read(f"{owner}.v", x))
            if self.llama:
                q, k = self.rotate(q), self.rotate(k)
            scores = (self.bilinear(q, k.mT) / math.sqrt(d)).masked_fill(~mask, -math.inf)
            pattern = scores.softmax(-1)
            if self.rules.softmax == "softer":  # the value of one, the derivative of the other
                warm = (scores / 2).softmax(-1)
                pattern = pattern.detach() + 2 * (warm - warm.detach())
            if self.rules.softmax == "constant":
                pattern = pattern.detach()
            mixed.append(self.bilinear(pattern, v))
        z = torch.cat(mixed, -1)
        sites[f"L{layer}.z"] = z
        if self.llama:
            w, bias = self.p[f"model.layers.{layer}.self_attn.o_proj.weight"].T, 0.0
        else:
            w = self.p[f"transformer.h.{layer}.attn.c_proj.weight"]
            bias = self.p[f"transformer.h.{layer}.attn.c_proj.bias"]
        for h in range(self.heads):
            rows = slice(h * d, (h + 1) * d)
            writers[f"L{layer}H{h}"] = z[..., rows] @ w[rows]
        out = z @ w + bias
        sites[f"L{layer}.attn"] = out
        return out

    def project(self, layer: int, slot: str, head: int, x: Tensor) -> Tensor:
        d = self.d_head
        if self.llama:
            x = self.norm(x, f"model.layers.{layer}.input_layernorm")
            w = self.p[f"model.layers.{layer}.self_attn.{slot}_proj.weight"]
            return x @ w[head * d : (head + 1) * d].T
        x = self.norm(x, f"transformer.h.{layer}.ln_1")
        at = "qkv".index(slot) * self.heads * d + head * d
        w = self.p[f"transformer.h.{layer}.attn.c_attn.weight"][:, at : at + d]
        return x @ w + self.p[f"transformer.h.{layer}.attn.c_attn.bias"][at : at + d]

    def rotate(self, x: Tensor) -> Tensor:
        half = self.d_head // 2
        theta = self.config.rope_parameters["rope_theta"]
        frequency = theta ** (-torch.arange(half, dtype=torch.double) / half)
        angle = torch.arange(x.shape[1], dtype=torch.double)[:, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.llama:
            at = f"model.layers.{layer}"
            x = self.norm(x, f"{at}.post_attention_layernorm")
            gate = self.activation(x @ self.p[f"{at}.mlp.gate_proj.weight"].T)
            up = x @ self.p[f"{at}.mlp.up_proj.weight"].T
            return self.product(gate, up) @ self.p[f"{at}.mlp.down_proj.weight"].T
        at = f"transformer.h.{layer}"
        x = self.norm(x, f"{at}.ln_2")
        x = x @ self.p[f"{at}.mlp.c_fc.weight"] + self.p[f"{at}.mlp.c_fc.bias"]
        return (
            self.activation(x) @ self.p[f"{at}.mlp.c_proj.weight"] + self.p[f"{at}.mlp.c_proj.bias"]
        )

    def coefficients(self, task: Any, side: str) -> dict[str, Tensor]:
        """d metric / d site on one side, under the rules."""
        tokens = getattr(task, side)
        with torch.no_grad():
            root = self.run(tokens).writers["embed"]
        trace = self.run(tokens, root.requires_grad_())
        names = [n for n in trace.sites if not n.endswith(".mid")]
        metric = task.metric(trace.logits).sum()
        grads = torch.autograd.grad(metric, [trace.sites[n] for n in names])
        return dict(zip(names, grads, strict=True))
