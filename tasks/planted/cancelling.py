"""Two paths that cancel where the run is, and do not over the whole step.

    Mary has plenty ?  ->  yes, rather than no

    embed --v--> L0H0 (bring) --v--> L1H0 (hand on) ----------------> logits
                                        |                              ^
                                        +--> L1.mlp (minus, up to a half)

The MLP takes away what the head writes, but no more than a half of it. At the corrupt run, where
nothing is there, the two slopes are equal and opposite: to first order nothing that comes before
matters. Over the whole step one half is left.

Source: the zero gradients by cancellation of Kramár et al. 2024, arXiv:2403.00745 (AtP*).
"""

from __future__ import annotations

import random

from tasks.planted.factory import Pair, Plan, circuit
from tasks.planted.stream import Head, Neuron, Stream
from tasks.planted.weights import Wiring

__all__ = ["cancellation"]

NAMES = ("Mary", "John", "Anna", "Tom")
MUCH, NONE = ("plenty", "lots", "heaps"), ("nothing", "little", "none")
YES, NO = "yes", "no"
MARGIN = 0.5
"""From a run's values to the corners of the neurons."""


@circuit
def cancellation(rng: random.Random, pairs: int) -> Plan:
    """A head and an MLP that take back what it says (Llama), up to a half.

    Built to break gradients: upstream of the two paths they are 0.

    >>> planted = tasks.planted.cancellation(pairs=4)
    >>> "embed->L0H0.v" in planted.edges
    True
    """
    words = (*NAMES, *MUCH, *NONE, "has", "?", YES, NO)
    s = Stream(token=words, amount=1, much=1, asks=1, seen=1, told=1, taken=1)
    says = dict.fromkeys(MUCH, s["amount"] + s["much"]) | dict.fromkeys(NONE, s["amount"])
    told = s["told"]
    wiring = Wiring(
        "llama",
        s,
        heads=[
            Head("L0H0", s["one"], s["amount"], value=s["much"], out=s["seen"]),
            Head("L1H0", s["one"], s["asks"], value=s["seen"], out=2 * told),
        ],
        neurons=[  # what is told, from 0 up to 1
            Neuron(1, reads=told + MARGIN * s["one"], writes=s["taken"]),
            Neuron(1, reads=told - (2 - MARGIN) * s["one"] + MARGIN * s["one"], writes=-s["taken"]),
        ],
        says=says | {"?": s["asks"]},
        logits={YES: 12 * (told - s["taken"]) - 6 * s["one"] + 12 * MARGIN * s["one"]},
    )
    return Plan(
        wiring,
        [_pair(rng) for _ in range(pairs)],
        edges=["embed->L0H0.v", "L0H0->L1H0.v", "L1H0->L1.mlp.in", "L1H0->logits.in",
               "L1.mlp->logits.in"],
        direction="denoise",
        about="gradients: two paths whose slopes cancel at the own run, but not over the step",
    )  # fmt: skip


def _pair(rng: random.Random) -> Pair:
    name, much, none = rng.choice(NAMES), rng.choice(MUCH), rng.choice(NONE)
    return Pair(f"{name} has {much} ?", f"{name} has {none} ?", answer=YES, foil=NO)
