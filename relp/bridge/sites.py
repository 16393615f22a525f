"""Where a component of a `TransformerBridge` writes and reads: the only file with hook names.

A site is a hook point of the bridge, used through plain torch hooks, so that the tensors seen are
the ones on the path (`HookPoint.add_hook` converts shapes, and gradients of converted copies are
zero). Names of sites: `L3.resid` (entering block 3), `L3.q` `L3.k` `L3.v` (before rotary and
QK-norm), `L3.z` (the heads' mixed values, before W_O), `L3.heads` (their sum, where a post-norm
reads it), `L3.attn` and `L3.mlp` (what is added to the residual stream), `L3.mid` (the stream
between the two), `L3.mlp_in`, `L3.up` and, gated, `L3.gate` (each neuron before the activation),
`L3.neurons` (what the MLP's last matrix reads), `L3.mlp_out` (what it gives, where a post-norm
reads it), `final` (the residual stream that the final norm reads), `unembed` (what the unembedding
reads; here positions may be left out, before it some models restore the shape). Where heads cannot
be told apart (multi-head latent attention, state-space models) a block has a mixer: `L3.mixer_in`
and `L3.mixer` take the places of q, k, v and z, attn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import PurePath
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relp.layout import Component, Layout

__all__ = ["Block", "Sites", "editing", "reading"]


MIXERS = ("attn", "linear_attn", "mamba", "mixer", "ssm")
"""What the bridge calls the part of a block that moves information between positions."""


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block: its parts, and how its heads are counted."""

    layer: int
    heads: int
    """0 where heads cannot be told apart: then the mixer is one writer and one reader."""
    kv_heads: int
    norm: nn.Module | None
    """What the attention's readers read through."""
    mlp_norm: nn.Module | None
    q: Any
    k: Any
    v: Any
    o: Any
    """Projections; None in a mixer."""
    mlp: bool
    """False where the mixer is all there is (Mamba)."""
    parallel: bool
    """The MLP reads the block's input, not what the block's heads wrote."""
    attn_post: nn.Module | None
    """The norm through which the heads' sum is added to the stream (Gemma-2, OLMo-2)."""
    neurons: int
    """Neurons of the MLP; 0 where it is no single one (mixture of experts)."""
    up: Any
    gate: Any
    down: Any
    """Its matrices; None where there is no such one."""
    mlp_post: nn.Module | None
    """The norm through which the neurons' sum is added to the stream (Gemma-2, OLMo-2)."""
    split: tuple[int, ...] = ()
    """Neurons that are writers and readers of their own; the MLP is the rest of them."""

    def name(self, part: str) -> str:
        """`L3.mlp` for part `mlp`."""
        return f"L{self.layer}.{part}"

    @property
    def head_names(self) -> tuple[str, ...]:
        """`L3H0`, `L3H1`, …; empty for a mixer."""
        return tuple(f"L{self.layer}H{h}" for h in range(self.heads))

    @property
    def neuron_names(self) -> tuple[str, ...]:
        """`L3N0`, `L3N1`, …"""
        return tuple(f"L{self.layer}N{n}" for n in range(self.neurons))

    @property
    def split_names(self) -> tuple[str, ...]:
        """The neurons that are writers and readers of their own."""
        return tuple(f"L{self.layer}N{n}" for n in self.split)

    @property
    def kv_names(self) -> tuple[str, ...]:
        """Who reads keys and values: the heads, or with grouped queries `L3KV0`, …"""
        if self.kv_heads == self.heads:
            return self.head_names
        return tuple(f"L{self.layer}KV{h}" for h in range(self.kv_heads))

    @property
    def attention_readers(self) -> tuple[tuple[str, nn.Module, int], ...]:
        """`(site, projection, number of heads)` for q, k and v; empty for a mixer."""
        if not self.heads:
            return ()
        return (
            (self.name("q"), self.q, self.heads),
            (self.name("k"), self.k, self.kv_heads),
            (self.name("v"), self.v, self.kv_heads),
        )

    @property
    def neuron_readers(self) -> tuple[tuple[str, nn.Module], ...]:
        """`(site, projection)` of what each neuron reads through: one, or two where it is gated."""
        both = (("gate", self.gate), ("up", self.up))
        return tuple((self.name(part), module) for part, module in both if module is not None)

    @property
    def components(self) -> tuple[str, ...]:
        """All node-level components of the block but neurons."""
        whole = "attn" if self.heads else "mixer"
        mlp = (self.name("mlp"),) if self.mlp else ()
        return (self.name("resid"), *self.head_names, self.name(whole), *mlp)

    @property
    def mixer_readers(self) -> tuple[str, ...]:
        """The readers of the block's attention or mixer, in the order of their columns."""
        if not self.heads:
            return (f"{self.name('mixer')}.in",)
        q = tuple(f"{h}.q" for h in self.head_names)
        kv = tuple(f"{h}.{slot}" for slot in "kv" for h in self.kv_names)
        return (*q, *kv)

    @property
    def mlp_readers(self) -> tuple[str, ...]:
        """The neurons that are readers of their own, and the rest of the MLP."""
        return tuple(f"{writer}.in" for writer in self.mlp_writers)

    @property
    def readers(self) -> tuple[str, ...]:
        """All readers of the block, in the order of their columns."""
        return (*self.mixer_readers, *self.mlp_readers)

    @property
    def mlp_writers(self) -> tuple[str, ...]:
        """The neurons that are writers of their own, and the rest of the MLP."""
        return (*self.split_names, self.name("mlp")) if self.mlp else ()

    @property
    def writers(self) -> tuple[str, ...]:
        """All writers of the block, in the order of their rows."""
        return (*(self.head_names or (self.name("mixer"),)), *self.mlp_writers)


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
            TypeError: `model` is not a TransformerBridge with one stack of blocks.
            ValueError: the model is in train mode, or a block has no part that it knows.
        """
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        missing = [p for p in ("blocks", "cfg", "ln_final", "unembed") if not hasattr(model, p)]
        if missing:
            raise TypeError(
                "`model` must be a TransformerBridge with one stack of blocks, a final norm and an "
                f"unembedding; got a {type(model).__name__} without {', '.join(missing)} (as "
                "encoder-decoders and plain modules); load a decoder with "
                "TransformerBridge.boot_transformers(name), or use relp.propagate and "
                "relp.coverage, which work on any module"
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
        for layer, module in enumerate(model.blocks):
            block, found = _block(model.cfg, layer, module)
            blocks.append(block)
            points |= {block.name(part): point for part, point in found.items()}
        name = str(getattr(model.cfg, "model_name", type(model).__name__))
        # a folder's path says where a user keeps files, not which model it is
        name = PurePath(name).name if PurePath(name).is_absolute() else name
        return cls(model, points, tuple(blocks), name)

    def splitting(self, neurons: Sequence[str]) -> Sites:
        """These sites with some neurons as writers and readers of their own.

        Raises:
            ValueError: a name is not that of a neuron, or the matrices of its MLP cannot be told
                apart.
        """
        chosen: dict[int, set[int]] = {}
        for name in [neurons] if isinstance(neurons, str) else neurons:
            _, kind, layer, number = Component.parse(name)
            if kind != "neuron" or layer >= len(self.blocks):
                raise ValueError(
                    f"`neurons` must be names such as 'L0N3' of a model of {len(self.blocks)} "
                    f"blocks; got {name!r}; see Scores.components of attribute(components='neuron')"
                    ", and use circuits on the model they are of"
                )
            chosen.setdefault(layer, set()).add(number)
        for layer, numbers in chosen.items():
            block, last = self.blocks[layer], max(numbers)
            if {shape(module)[0] for _, module in block.neuron_readers} != {block.neurons}:
                raise ValueError(
                    "neurons with edges of their own need an MLP whose matrices can be told apart; "
                    f"block {layer} has none (but experts, joint matrices or a mixer alone); leave "
                    f"L{layer}N{last} out"
                )
            if last >= block.neurons:
                raise ValueError(
                    f"`neurons` of block {layer} must be below {block.neurons}, as many as it has; "
                    f"got L{layer}N{last}; count from 0"
                )
        split = {layer: tuple(sorted(numbers)) for layer, numbers in chosen.items()}
        blocks = tuple(replace(b, split=split.get(b.layer, ())) for b in self.blocks)
        return replace(self, blocks=blocks)

    @property
    def neurons(self) -> tuple[str, ...]:
        """Names of the neurons that are writers and readers of their own."""
        return tuple(name for b in self.blocks for name in b.split_names)

    def chosen(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Names of node-level components, in the order of the model.

        Args:
            wanted: names (`L3H1`, `L3N17`) or kinds (`head`, `neuron`); all but neurons if None.

        Raises:
            ValueError: there is no such name or kind, or none is asked for.
        """
        if wanted is None:
            return self.components
        asked = {wanted} if isinstance(wanted, str) else set(wanted)
        kinds = {name: Component.parse(name).kind for name in self.components}
        kinds |= {name: "neuron" for b in self.blocks for name in b.neuron_names}
        unknown = asked - kinds.keys() - set(kinds.values())
        if unknown or not asked:
            raise ValueError(
                f"`components` must be names such as {self.components[1]!r} or kinds out of "
                f"{sorted(set(kinds.values()))}; got {min(unknown, default='none')!r}; see "
                "Scores.components"
            )
        return tuple(name for name, kind in kinds.items() if name in asked or kind in asked)

    def part(self, component: str) -> tuple[str, int, int]:
        """Where a component's value is: site, which part of it, of how many equal ones."""
        _, kind, layer, number = Component.parse(component)
        if kind == "embed":
            return self.blocks[0].name("resid"), 0, 1
        block = self.blocks[layer]
        if kind == "head":
            return block.name("z"), number, block.heads
        if kind == "neuron":
            return block.name("neurons"), number, block.neurons
        return component, 0, 1

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the node-level components but neurons, in the order of `Scores.nodes`."""
        return ("embed", *(c for b in self.blocks for c in b.components))

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers, in the order of rows of `Scores.edges`."""
        return ("embed", *(w for b in self.blocks for w in b.writers))

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers, in the order of columns of `Scores.edges`."""
        return (*(r for b in self.blocks for r in b.readers), "logits.in")

    @cached_property
    def layout(self) -> Layout:
        """Which edges the model has, and where in `Scores.edges`."""
        return Layout.of(self.writers, self.readers, self.parallel)

    @property
    def written(self) -> tuple[str, ...]:
        """The sites where blocks write, in the order of a run."""
        parts = (
            (b, ("z" if b.heads else "mixer", *(["mlp"] if b.mlp else []))) for b in self.blocks
        )
        return tuple(b.name(p) for b, names in parts for p in names)

    @property
    def parallel(self) -> bool:
        """True if MLPs do not read what their own block's heads write."""
        return any(b.parallel for b in self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        first = next(self.model.parameters())
        if not first.is_meta:
            return first.device
        embedding = _inner(self.model.original_model.get_input_embeddings())
        return torch.device(embedding._hf_hook.execution_device)  # its weights are offloaded


def _block(cfg: Any, layer: int, module: Any) -> tuple[Block, dict[str, nn.Module]]:
    """The parts of one block, and its sites by part."""
    # not getattr: a bridge looks for what it lacks in the module that it wraps
    parts: dict[str, Any] = dict(module.named_children())
    mixer = next((parts[n] for n in MIXERS if n in parts), None)
    if mixer is None:
        raise ValueError(
            f"a block must have one of {', '.join(MIXERS)}; block {layer} is a "
            f"{type(module).__name__} with {[n for n in parts if 'hook' not in n]}; use "
            "relp.propagate and relp.coverage, which work on any module"
        )
    inside = dict(mixer.named_children())
    projections: list[Any] = [inside.get(p) for p in "qkvo"]
    q, k, v, o = projections
    heads = 0 if None in projections else int(cfg.n_heads)
    parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
    norm = parts.get("ln1", parts.get("norm"))  # OLMo-2 norms only what it adds
    mlp = parts.get("mlp")
    inner = {} if mlp is None else dict(mlp.named_children())
    down = inner.get("out")
    # a mixture of experts has a `gate` too, but it is the router
    up, gate = (None if down is None else inner.get(name) for name in ("in", "gate"))
    block = Block(
        layer=layer,
        heads=heads,
        kv_heads=heads and int(getattr(cfg, "n_key_value_heads", None) or heads),
        norm=norm,
        mlp_norm=parts.get("ln2", norm if parallel else None),
        q=q,
        k=k,
        v=v,
        o=o,
        mlp=mlp is not None,
        parallel=parallel,
        attn_post=parts.get("ln1_post") if heads else None,
        neurons=0 if down is None else shape(down)[1],
        up=up,
        gate=gate,
        down=down,
        mlp_post=parts.get("ln2_post") if mlp is not None else None,
    )
    points: dict[str, Any] = {"resid": module.hook_in}
    added = module.hook_attn_out if "attn" in parts else mixer.hook_out
    if heads:
        points |= {"q": q.hook_out, "k": k.hook_out, "v": v.hook_out, "z": o.hook_in, "attn": added}
        if block.attn_post is not None:
            points["heads"] = block.attn_post.hook_in
    else:
        points |= {"mixer_in": mixer.hook_in, "mixer": added}
    if mlp is not None:
        # an MLP without a module of its own (OPT) begins where its first layer does
        entry = mlp if mlp.name is not None else getattr(mlp, "in")
        points |= {"mlp_in": entry.hook_in, "mlp": module.hook_mlp_out}
        if not parallel:
            # without a norm before it (OLMo-2) the MLP reads the stream itself
            points["mid"] = parts.get("ln2", entry).hook_in
        if block.mlp_post is not None:
            points["mlp_out"] = block.mlp_post.hook_in
    if down is not None:
        points["neurons"] = down.hook_in
    points |= {n: m.hook_out for n, m in (("up", up), ("gate", gate)) if m is not None}
    return block, points


Edit = Callable[[Tensor], Tensor]


@contextmanager
def _visiting(sites: Sites, visits: Mapping[str, Edit]) -> Iterator[None]:
    """Shows each function its site's tensor as `[pair, pos, d]`; its result takes that place.

    Only in this thread: others may run the same model.
    """
    shape: list[int] = []
    here = get_ident()

    def begin(_: nn.Module, __: Any, value: Tensor) -> None:
        if get_ident() == here:
            shape[:] = value.shape[:2]

    def visit(name: str, _: nn.Module, __: Any, value: Tensor) -> Tensor:
        if get_ident() != here:
            return value
        if value.dim() == 2 and len(value) == math.prod(shape):
            # OPT's MLP works on merged pairs and positions
            return visits[name](value.unflatten(0, shape)).flatten(0, 1)
        if value.dim() != 3:
            raise ValueError(
                f"a site must hold [pair, pos, d]; {name!r} holds {list(value.shape)}; "
                "use relp.propagate on this architecture"
            )
        return visits[name](value)

    with ExitStack() as stack:
        for block in sites.blocks:  # any may be the first that runs
            entry = sites.points[block.name("resid")]
            stack.callback(entry.register_forward_hook(begin).remove)
        for name in visits:
            hook = sites.points[name].register_forward_hook(partial(visit, name))
            stack.callback(hook.remove)
        yield


@contextmanager
def reading(sites: Sites, names: Iterator[str] | tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collects the tensors at the named sites while the model runs inside.

    Raises:
        RuntimeError: at the end, if a site was not passed or was passed twice.
    """
    names = tuple(names)
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        if name in seen:
            raise RuntimeError(
                f"site {name!r} must be passed once per run; it was passed again; "
                "run the model once, on one batch"
            )
        seen[name] = value
        return value

    with _visiting(sites, {n: partial(keep, n) for n in names}):
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

    def change(name: str, value: Tensor) -> Tensor:
        done.add(name)
        return edits[name](value)

    with _visiting(sites, {n: partial(change, n) for n in edits}):
        yield
    missing = [n for n in edits if n not in done]
    if missing:
        raise RuntimeError(
            f"an edited site must be passed when the model runs; {missing[0]!r} was not; turn off "
            "use_split_qkv_input, use_attn_result and use_hook_mlp_in, which take other paths"
        )


def weights_identity(model: Any) -> dict[str, str]:
    """What tells a model's weights from others: their `dtype`, and a hash of all (`weights`).

    Weights are hashed as they lie in memory, name by name; those on a disk are fetched.
    """
    from accelerate.utils import align_module_device  # not at the top: it takes a second

    digest, dtypes = hashlib.sha256(), set()
    for module in getattr(model, "original_model", model).modules():
        with torch.no_grad(), align_module_device(module):
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                if tensor.is_floating_point():
                    dtypes.add(str(tensor.dtype).removeprefix("torch."))
                digest.update(f"{name} {list(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
    return {"dtype": "+".join(sorted(dtypes)), "weights": digest.hexdigest()[:16]}


# -- projections -----------------------------------------------------------------------------------


def weight(projection: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The matrix that a linear module multiplies by, whichever way round its class stores it.

    Where its `weight` is not what it computes with (an adapter beside it, quantised or offloaded
    weights) the matrix is read off the module, run on unit vectors.

    Raises:
        RuntimeError: the module is no linear map.
    """
    inner = _inner(projection)
    if not is_plain(inner):
        return _measured(inner)[0]
    matrix = _at_hand(inner, "weight").detach()
    return matrix.T if _is_transposed(inner) else matrix


def bias(projection: nn.Module) -> Float[Tensor, " d_out"] | None:
    """What a linear module adds, if anything. Errors are those of `weight`."""
    inner = _inner(projection)
    if not is_plain(inner):
        return _measured(inner)[1]
    offset = _at_hand(inner, "bias")
    return None if offset is None else offset.detach()


def shape(projection: nn.Module) -> tuple[int, int]:
    """`(d_out, d_in)` of a linear module, without its weights."""
    inner = _inner(projection)
    if hasattr(inner, "out_features") and hasattr(inner, "in_features"):  # 4-bit weights are packed
        return int(inner.out_features), int(inner.in_features)
    d_out, d_in = inner.weight.shape
    return (d_in, d_out) if _is_transposed(inner) else (d_out, d_in)


def is_plain(module: Any) -> bool:
    """True if a module computes with its own `weight` and `bias`, wherever they are."""
    forward = type(module).forward
    # accelerate keeps the module's own forward beside the one that fetches offloaded weights
    own = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward")
    if getattr(own, "__func__", forward if own is None else own) is not forward:
        return False
    return forward is nn.Linear.forward or _is_transposed(module)


def _at_hand(module: Any, parameter: str) -> Any:
    """A module's parameter, fetched if it is offloaded; None if it has none."""
    from accelerate.utils import align_module_device  # not at the top: it takes a second

    with align_module_device(module):
        return getattr(module, parameter, None)


def _inner(projection: Any) -> Any:
    """The module of the model itself: a bridge wraps it."""
    return getattr(projection, "original_component", None) or projection


def _is_transposed(module: Any) -> bool:
    """transformers' Conv1D (GPT-2) holds `[d_in, d_out]`."""
    return type(module).__name__ == "Conv1D"


def _measured(module: Any) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
    """Matrix and bias of a module that gives them away by what it computes only."""
    _, d_in = shape(module)
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    units = torch.eye(d_in, dtype=like.dtype, device=like.device if device is None else device)
    probe = torch.linspace(-1, 1, d_in).cos().to(units) * units.new_tensor([[1.0], [-2.0]])
    with torch.no_grad():
        offset, *rows = module(torch.cat([torch.zeros_like(units[:1]), units, probe])[None])[0]
        matrix = (torch.stack(rows[:d_in]) - offset).T
        expected, found = probe @ matrix.T + offset, torch.stack(rows[d_in:])
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= max(1e-3, 8 * torch.finfo(units.dtype).eps) * max(size, 1e-6):
        raise RuntimeError(
            f"a projection must be a linear map to have edges; a {type(module).__name__} differs "
            f"from the matrix that it shows by {error:.2g} of {size:.2g}; merge the adapter, load "
            "the weights unquantised, or use level='node'"
        )
    return matrix, offset


# -- norms -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Norm:
    """What a layer or RMS norm computes with."""

    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float
    centres: bool
    """True for a layer norm: the mean is taken off first."""


def norm_parameters(norm: Any) -> Norm:
    """The parameters of a block's norm, whatever its class calls them."""
    inner = _inner(norm)
    scale, offset = _at_hand(inner, "weight"), _at_hand(inner, "bias")
    centres = not norm.uses_rms_norm
    if scale is not None:  # Gemma keeps the weight's distance from 1
        scale = scale.detach().float() + (1.0 if norm.uses_weight_offset else 0.0)
    eps = getattr(inner, "eps", getattr(inner, "variance_epsilon", None))
    return Norm(
        weight=scale,
        bias=offset.detach().float() if centres and offset is not None else None,
        eps=float(norm.config.eps if eps is None else eps),
        centres=centres,
    )
