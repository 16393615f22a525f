"""Where a component of a `TransformerBridge` writes and reads: the only file with hook names.

A site is a hook point of the bridge, used through plain torch hooks, so that the tensors seen are
the ones on the path (`HookPoint.add_hook` converts shapes, and gradients of converted copies are
zero). Names of sites: `L3.resid` (entering block 3), `L3.q` `L3.k` `L3.v` (before rotary and
QK-norm), `L3.z` (the heads' mixed values, before W_O), `L3.neurons` (what the MLP's last matrix
reads), `L3.attn` and `L3.mlp` (what is added to the residual stream), `final` (the residual stream
that the final norm reads), `unembed` (what the unembedding reads; here positions may be left out,
before it some models restore the shape).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Block", "Sites", "editing", "reading"]


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block: its parts, and how its heads are counted."""

    layer: int
    heads: int
    kv_heads: int
    norm: nn.Module | None
    """What the attention's readers read through."""
    mlp_norm: nn.Module | None
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    parallel: bool
    """The MLP reads the block's input, not what the block's heads wrote."""
    post_norm: bool
    """What attention and MLP add passes through a norm first (Gemma-2, OLMo-2)."""
    neurons: int
    """Neurons of the MLP; 0 where it is no single one (mixture of experts)."""

    def name(self, part: str) -> str:
        """`L3.mlp` for part `mlp`."""
        return f"L{self.layer}.{part}"

    @property
    def head_names(self) -> tuple[str, ...]:
        """`L3H0`, `L3H1`, …"""
        return tuple(f"L{self.layer}H{h}" for h in range(self.heads))

    @property
    def neuron_names(self) -> tuple[str, ...]:
        """`L3N0`, `L3N1`, …"""
        return tuple(f"L{self.layer}N{n}" for n in range(self.neurons))

    @property
    def kv_names(self) -> tuple[str, ...]:
        """Who reads keys and values: the heads, or with grouped queries `L3KV0`, …"""
        if self.kv_heads == self.heads:
            return self.head_names
        return tuple(f"L{self.layer}KV{h}" for h in range(self.kv_heads))

    @property
    def attention_readers(self) -> tuple[tuple[str, nn.Module, int], ...]:
        """`(site, projection, number of heads)` for q, k and v."""
        return (
            (self.name("q"), self.q, self.heads),
            (self.name("k"), self.k, self.kv_heads),
            (self.name("v"), self.v, self.kv_heads),
        )

    @property
    def readers(self) -> tuple[str, ...]:
        """All readers of the block, in the order of their columns."""
        q = tuple(f"{h}.q" for h in self.head_names)
        kv = tuple(f"{h}.{slot}" for slot in "kv" for h in self.kv_names)
        return (*q, *kv, f"{self.name('mlp')}.in")

    @property
    def writers(self) -> tuple[str, ...]:
        """All writers of the block, in the order of their rows."""
        return (*self.head_names, self.name("mlp"))


@dataclass(frozen=True, eq=False)
class Sites:
    """The sites of one model."""

    model: Any
    points: Mapping[str, nn.Module]
    blocks: tuple[Block, ...]
    model_name: str

    @classmethod
    def of(cls, model: Any) -> Sites:
        """Finds the sites of a `TransformerBridge`.

        Raises:
            TypeError: `model` is not a TransformerBridge.
            ValueError: the model is in train mode, or a block has no heads that can be told apart.
        """
        if not all(hasattr(model, part) for part in ("blocks", "cfg", "ln_final", "unembed")):
            raise TypeError(
                "`model` must be a TransformerBridge with blocks, ln_final and unembed; got "
                f"{type(model).__name__}; load it with TransformerBridge.boot_transformers(name), "
                "or use relp.propagate on a plain module"
            )
        training = [n or "the model" for n, m in model.named_modules() if m.training]
        if training:
            raise ValueError(
                f"the model must be in eval mode, or dropout makes every number noise; "
                f"{training[0]!r} is in train mode; call model.eval()"
            )
        points: dict[str, nn.Module] = {
            "final": model.ln_final.hook_in,
            "unembed": model.unembed.hook_in,
        }
        blocks = []
        for layer, block in enumerate(model.blocks):
            attn = getattr(block, "attn", None)
            parts: list[Any] = [getattr(attn, p, None) for p in "qkvo"]
            if any(p is None for p in parts) or not hasattr(block, "mlp"):
                raise ValueError(
                    "a block must have an attention with q, k, v and o and an MLP; block "
                    f"{layer} is a {type(block).__name__} with "
                    f"{[n for n, _ in block.named_children()]}; use relp.propagate for this model"
                )
            q, k, v, o = parts
            heads = int(model.cfg.n_heads)
            parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
            norm = getattr(block, "ln1", None)  # OLMo-2 norms only what it adds
            down = getattr(block.mlp, "out", None)
            blocks.append(
                Block(
                    layer=layer,
                    heads=heads,
                    kv_heads=int(getattr(model.cfg, "n_key_value_heads", None) or heads),
                    norm=norm,
                    mlp_norm=getattr(block, "ln2", norm),
                    q=q,
                    k=k,
                    v=v,
                    o=o,
                    parallel=parallel,
                    post_norm=hasattr(block, "ln1_post") or hasattr(block, "ln2_post"),
                    neurons=0 if down is None else weight(down).shape[1],
                )
            )
            points |= {
                f"L{layer}.resid": block.hook_in,
                f"L{layer}.q": q.hook_out,
                f"L{layer}.k": k.hook_out,
                f"L{layer}.v": v.hook_out,
                f"L{layer}.z": o.hook_in,
                f"L{layer}.attn": block.hook_attn_out,
                f"L{layer}.mlp_in": block.mlp.hook_in,
                f"L{layer}.mlp": block.hook_mlp_out,
            }
            if down is not None:
                points[f"L{layer}.neurons"] = down.hook_in
            if not parallel:
                # without a norm before it (OLMo-2) the MLP reads the stream itself
                points[f"L{layer}.mid"] = getattr(block, "ln2", block.mlp).hook_in
        name = str(getattr(model.cfg, "model_name", type(model).__name__))
        # a folder's path says where a user keeps files, not which model it is
        name = PurePath(name).name if PurePath(name).is_absolute() else name
        return cls(model, points, tuple(blocks), name)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the node-level components, in the order of `Scores.nodes`."""
        names = ["embed"]
        for b in self.blocks:
            names += [b.name("resid"), *b.head_names, b.name("attn"), b.name("mlp")]
        return tuple(names)

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers, in the order of rows of `Scores.edges`."""
        return ("embed", *(w for b in self.blocks for w in b.writers))

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers, in the order of columns of `Scores.edges`."""
        return (*(r for b in self.blocks for r in b.readers), "logits.in")

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return next(self.model.parameters()).device


Edit = Callable[[Tensor], Tensor]


@contextmanager
def reading(sites: Sites, names: Iterator[str] | tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collects the tensors at the named sites while the model runs inside.

    Raises:
        RuntimeError: at the end, if a site was not passed or was passed twice.
    """
    names = tuple(names)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, value: Tensor) -> None:
            if value.dim() != 3:
                raise ValueError(
                    f"a site must hold [pair, pos, d]; {name!r} holds {list(value.shape)}; this "
                    "architecture merges pairs and positions: use relp.propagate on it"
                )
            if name in seen:
                raise RuntimeError(
                    f"site {name!r} must be passed once per run; it was passed again; "
                    "run the model once, on one batch"
                )
            seen[name] = value

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(sites.points[name].register_forward_hook(keep(name)).remove)
        yield seen
    missing = [n for n in names if n not in seen]
    if missing:
        raise RuntimeError(
            f"every site must be passed when the model runs; {missing[0]!r} was not "
            f"({len(missing)} in all); turn off use_split_qkv_input, use_attn_result and "
            "use_hook_mlp_in, which take other paths"
        )


@contextmanager
def editing(sites: Sites, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replaces the tensor at each named site by what its function returns.

    Raises:
        RuntimeError: at the end, if an edit never took place.
    """
    done: set[str] = set()

    def change(name: str, edit: Edit) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, value: Tensor) -> Tensor:
            done.add(name)
            return edit(value)

        return hook

    with ExitStack() as stack:
        for name, edit in edits.items():
            stack.callback(sites.points[name].register_forward_hook(change(name, edit)).remove)
        yield
    missing = [n for n in edits if n not in done]
    if missing:
        raise RuntimeError(
            f"an edited site must be passed when the model runs; {missing[0]!r} was not; turn off "
            "use_split_qkv_input, use_attn_result and use_hook_mlp_in, which take other paths"
        )


def weight(projection: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The matrix of a linear module, whichever way round its class stores it."""
    inner: Any = getattr(projection, "original_component", None) or projection
    matrix: Tensor = inner.weight.detach()
    # transformers' Conv1D (GPT-2) holds [d_in, d_out]
    return matrix.T if type(inner).__name__ == "Conv1D" else matrix


def bias(projection: nn.Module) -> Float[Tensor, " d_out"] | None:
    """The bias of a linear module, if it has one."""
    inner: Any = getattr(projection, "original_component", None) or projection
    return None if inner.bias is None else inner.bias.detach()
