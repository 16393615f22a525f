"""Names of hook points, as dictionaries on disk carry them, and the sites of ours that they mean.

TransformerLens counts a block's output with the block, we with the next one: the output of block 3
is `L4.resid`, or `final` if block 3 is the last, which a file does not say: see `same_site`.

Three names can mean something else than they say, and come with a doubt, a sentence that
`Dictionary.must_fit` raises until `Dictionary.placed` settles it:

* `ln2.hook_normalized` is what the norm before the MLP gives *before* its gain (and bias). Of a
  model whose gains are folded into the next matrix (TransformerLens' `fold_ln`, and Gemma Scope's
  transcoders: arXiv:2408.05147, appendix on language models, "we fold the pre-MLP RMS norm gain
  parameters into the MLP input matrices") that is what the MLP reads; of the model as it is, which
  we run, the MLP reads it times the gain. `placed(..., gain=...)` divides the encoder by it.
* `hook_mlp_in` is before the norm in TransformerLens, but SAELens writes it for the transcoders of
  Gemma Scope 2, whose own config says `pre_feedforward_layernorm.output`, behind norm and gain.
* any name that is not in the table here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["HEADS_APART", "NOWHERE", "Place", "before_gain", "hook_of", "place_of", "same_site"]


class Place(NamedTuple):
    """A site, and what may be wrong about it."""

    site: str
    doubt: str = ""


NOWHERE = Place("")
"""Where a file says nothing."""

HEADS_APART = "hook_z"
"""What SAELens calls it that heads are an axis of their own at a hook point; of our sites never."""

PARTS = {
    "hook_resid_pre": "resid",
    "hook_in": "resid",
    "hook_resid_mid": "mid",
    "hook_attn_out": "attn",
    "hook_mlp_out": "mlp",
    "attn.hook_z": "z",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp",
    "mlp.hook_post": "neurons",
}
"""Hook points of a block; the first of a site is the one that is written."""

OUTPUTS = ("hook_resid_post", "hook_out")
"""What a block gives: the site of the next."""

OUTSIDE = {"ln_final.hook_in": "final", "unembed.hook_in": "unembed"}

MODULES = {
    "self_attn.o_proj.input": "z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_attention_layernorm.output": "",  # before the MLP in Llama, behind attention in Gemma
    "post_feedforward_layernorm.output": "mlp",
    "mlp.input": "mlp_in",
}
"""Inputs and outputs of modules of a decoder of transformers, as Gemma Scope 2 names them."""

SITE = re.compile(r"L\d+\.[a-z_]+|final|unembed")


def place_of(hook: str, *, module: str = "", transcoder: bool = False) -> Place:
    """Our site for a hook point of TransformerLens; `module`: the same as transformers' name.

    >>> from relp.dictionaries.hook_names import place_of
    >>> place_of("blocks.3.hook_resid_post").site
    'L4.resid'
    """
    if module and (found := _of_module(module)).site:
        return found
    if not hook:
        return NOWHERE
    if hook in OUTSIDE or SITE.fullmatch(hook):
        return Place(OUTSIDE.get(hook, hook))
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    layer, part = (int(block[1]), block[2]) if block else (0, "")
    if part in OUTPUTS:
        return Place(f"L{layer + 1}.resid")
    if part in PARTS:
        return Place(f"L{layer}.{PARTS[part]}")
    if part == "ln2.hook_normalized":
        return before_gain(layer, f"its hook name {hook!r}")
    if part == "hook_mlp_in" and transcoder:
        return Place(
            f"L{layer}.mlp_in",
            f"its hook name {hook!r} is before the norm in TransformerLens, where transcoders are "
            f"mostly trained behind it; say which with dictionary.placed('L{layer}.mid', "
            f"'L{layer}.mlp') or dictionary.placed('L{layer}.mlp_in', 'L{layer}.mlp')",
        )
    if part == "hook_mlp_in":
        return Place(f"L{layer}.mid")
    return Place(
        "", f"its hook name {hook!r} is none that is known here; say where it reads with "
        "dictionary.placed(site)"
    )  # fmt: skip


def before_gain(layer: int, what: str) -> Place:
    """What the MLP of a block reads, but for the gain of the norm before it."""
    return Place(
        f"L{layer}.mlp_in",
        f"{what} is behind the norm's division but before its gain, which the MLP of a model that "
        f"is not folded reads times the gain; divide the encoder by it with dictionary.placed("
        f"'L{layer}.mlp_in', 'L{layer}.mlp', gain=...), or leave gain out if it is folded",
    )


def _of_module(name: str) -> Place:
    """`model.layers.3.output` -> `L4.resid`."""
    found = re.fullmatch(r"(?:\w+\.)*?layers\.(\d+)\.(.+)", name)
    if found is None:
        return NOWHERE
    layer, part = int(found[1]), found[2]
    if part == "output":
        return Place(f"L{layer + 1}.resid")
    return Place(f"L{layer}.{MODULES[part]}") if MODULES.get(part) else NOWHERE


def hook_of(site: str) -> str:
    """The hook point of a site, as `place_of` reads it; the site itself where there is none."""
    for hook, outside in OUTSIDE.items():
        if site == outside:
            return hook
    block, _, part = site.partition(".")
    hooks = [hook for hook, own in PARTS.items() if own == part]
    return f"blocks.{block[1:]}.{hooks[0]}" if hooks else site


def same_site(one: str, other: str, blocks: int | None = None) -> bool:
    """True if two names are of one site, in a model of so many blocks.

    The output of the last block is `final`; where the number of blocks is not known any block may
    be the last.
    """
    if one == other:
        return True
    pair = {one, other}
    if "final" not in pair:
        return False
    (rest,) = pair - {"final"}
    last = re.fullmatch(r"L(\d+)\.resid", rest)
    return last is not None and int(last[1]) > 0 and blocks in (None, int(last[1]))
