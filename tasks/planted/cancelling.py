"""Two paths that cancel where the run is, and do not over the whole step.

    Mary has plenty ?  ->  yes, rather than no

    embed --v--> L0H0 (bring) --v--> L1H0 (hand on) ----------------> logits
                                        |                              ^
                                        +--> L1.mlp (take back a quarter)

The MLP takes back what the head says, but no more than a quarter. At the corrupt run, where nothing
is said, the two slopes are equal and opposite: to first order nothing that comes before matters.
Over the whole step three quarters are left. Noise makes the two slopes unequal: distractors without
noise are the harder test.

Source: Kramár et al. 2024, arXiv:2403.00745 (AtP*), where direct and indirect effects cancel.
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
QUARTER = 0.25


@circuit
def cancellation(rng: random.Random, pairs: int) -> Plan:
    """A head, and an MLP that takes back a quarter of what it says (GPT-2).

    Built to break gradients, and rules that take y/x of an activation: upstream they are 0.

    >>> made = planted.cancellation(pairs=4)
    >>> "embed->L0H0.v" in made.edges
    True
    """
    words = (*NAMES, *MUCH, *NONE, "has", "?", YES, NO)
    s = Stream(token=words, amount=1, much=1, asks=1, seen=1, told=1, taken=1)
    says = dict.fromkeys(MUCH, s["amount"] + s["much"]) | dict.fromkeys(NONE, s["amount"])
    quarter = QUARTER * s["one"]
    wiring = Wiring(
        "gpt2",
        s,
        heads=[
            Head("L0H0", s["one"], s["amount"], value=s["much"], out=s["seen"]),
            Head("L1H0", s["one"], s["asks"], value=s["seen"], out=s["told"]),
        ],
        neurons=[  # their difference goes from one quarter to two, and no further
            Neuron(1, reads=s["told"] + quarter, writes=s["taken"]),
            Neuron(1, reads=s["told"] - quarter, writes=-s["taken"]),
        ],
        says=says | {"?": s["asks"]},
        logits={YES: 16 * (s["told"] - s["taken"]) - 2 * s["one"]},
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
