"""XOR by an MLP that is flat wherever a run can be.

    toss heads tails ?  ->  differ, rather than same

    embed --v--> L0H0 (first coin)  --\
                                       L0.mlp (is there one head?) --> logits
    embed --v--> L0H1 (second coin) --/

The MLP counts heads: it answers 0 for none, 1 for one, 0 for two, with ramps between and flats
around, so that in every run its slope is 0. One coin of each pair is turned.

Source: the XOR of Minsky & Papert 1969; flat nonlinearities as a limit of gradients: Sundararajan
et al. 2017, arXiv:1703.01365 (integrated gradients), section 2.
"""

from __future__ import annotations

import random

from tasks.planted.factory import Pair, Plan, circuit
from tasks.planted.stream import Head, Neuron, Stream
from tasks.planted.weights import Wiring

__all__ = ["parity"]

HEADS, TAILS = ("heads", "obverse"), ("tails", "reverse")
TOSS = ("toss", "look", "now", "again")
DIFFER, SAME = "differ", "same"
RAMPS = {0.25: 1, 0.75: -1, 1.25: -1, 1.75: 1}
"""Where the number of heads bends what is answered, and by how much twice the slope changes."""


@circuit
def parity(rng: random.Random, pairs: int) -> Plan:
    """XOR of two coins (GPT-2), by four neurons.

    Built to break gradients, which are 0 behind the MLP, and rules that take an activation at the
    own run for all of it.

    >>> planted = tasks.planted.parity(pairs=4)
    >>> "L0H1->L0.mlp.in" in planted.edges
    True
    """
    s = Stream(token=(*HEADS, *TAILS, *TOSS, "?", DIFFER, SAME), place=5, up=1, a=1, b=1, one_up=1)
    count = s["a"] + s["b"]
    wiring = Wiring(
        "gpt2",
        s,
        heads=[
            Head("L0H0", s["place", 4], s["place", 2], value=s["up"], out=s["a"]),
            Head("L0H1", s["place", 4], s["place", 3], value=s["up"], out=s["b"]),
        ],
        neurons=[
            Neuron(0, reads=count - at * s["one"], writes=2 * bend * s["one_up"])
            for at, bend in RAMPS.items()
        ],
        says=dict.fromkeys(HEADS, s["up"]),
        logits={DIFFER: 12 * s["one_up"] - 6 * s["one"]},
    )
    return Plan(
        wiring,
        [_pair(rng, i) for i in range(pairs)],
        edges=["embed->L0H0.v", "embed->L0H1.v", "L0H0->L0.mlp.in", "L0H1->L0.mlp.in",
               "L0.mlp->logits.in"],
        direction="denoise",
        about="gradients and y/x rules: an XOR whose neurons are flat at every run",
    )  # fmt: skip


def _pair(rng: random.Random, number: int) -> Pair:
    """Each coin is turned in half of the pairs, whatever the other shows."""
    turned, first, second = number % 2, (number // 2) % 2, (number // 4) % 2
    toss = rng.choice(TOSS)

    def text(first: int, second: int) -> str:
        return f"{toss} {rng.choice((TAILS, HEADS)[first])} {rng.choice((TAILS, HEADS)[second])} ?"

    clean = [first, second]
    corrupt = [coin ^ (i == turned) for i, coin in enumerate(clean)]
    answer, foil = (DIFFER, SAME) if first ^ second else (SAME, DIFFER)
    return Pair(text(*clean), text(*corrupt), answer, foil)
