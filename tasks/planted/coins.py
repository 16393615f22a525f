"""Two coins that are alike or not: an MLP that is flat where the run is.

    toss heads heads ?  ->  same, rather than differ

    embed --v--> L0H0 (first coin)  --\
                                       L0.mlp (alike?) --> logits
    embed --v--> L0H1 (second coin) --/

The MLP counts heads: one neuron is on if there is none, another if there are two. In the corrupt
run one coin is turned, so that there is one: both neurons are off, the slope is 0, and what comes
before seems to be without effect.

Source: Sundararajan et al. 2017, arXiv:1703.01365 (integrated gradients): a function that is flat
at an input may still depend on it.
"""

from __future__ import annotations

import random

from tasks.planted.factory import Pair, Plan, circuit
from tasks.planted.stream import Head, Neuron, Stream
from tasks.planted.weights import Wiring

__all__ = ["parity"]

HEADS, TAILS = ("heads", "obverse"), ("tails", "reverse")
TOSS = ("toss", "look", "now", "again")
SAME, DIFFER = "same", "differ"


@circuit
def parity(rng: random.Random, pairs: int) -> Plan:
    """Are two coins alike? (GPT-2), by two neurons.

    Built to break gradients, and rules that take y/x of an activation: before the MLP they are 0.

    >>> made = planted.parity(pairs=4)
    >>> "L0H1->L0.mlp.in" in made.edges
    True
    """
    s = Stream(token=(*HEADS, *TAILS, *TOSS, "?", SAME, DIFFER), place=5, up=1, a=1, b=1, alike=1)
    count = s["a"] + s["b"]
    wiring = Wiring(
        "gpt2",
        s,
        heads=[
            Head("L0H0", s["place", 4], s["place", 2], value=s["up"], out=s["a"]),
            Head("L0H1", s["place", 4], s["place", 3], value=s["up"], out=s["b"]),
        ],
        neurons=[
            Neuron(0, reads=0.5 * s["one"] - count, writes=2 * s["alike"]),
            Neuron(0, reads=count - 1.5 * s["one"], writes=2 * s["alike"]),
        ],
        says=dict.fromkeys(HEADS, s["up"]),
        logits={SAME: 12 * s["alike"] - 6 * s["one"]},
    )
    return Plan(
        wiring,
        [_pair(rng, i) for i in range(pairs)],
        edges=["embed->L0H0.v", "embed->L0H1.v", "L0H0->L0.mlp.in", "L0H1->L0.mlp.in",
               "L0.mlp->logits.in"],
        direction="denoise",
        about="gradients and y/x rules: neurons that are all off at the own run",
        kinds=2,
    )  # fmt: skip


def _pair(rng: random.Random, number: int) -> Pair:
    """Each coin is turned in half of the pairs, from either side."""
    toss = rng.choice(TOSS)
    coins = [number // 2 % 2] * 2
    turned = list(coins)
    turned[number % 2] ^= 1

    def text(coins: list[int]) -> str:
        return " ".join([toss, *(rng.choice((TAILS, HEADS)[coin]) for coin in coins), "?"])

    return Pair(text(coins), text(turned), SAME, DIFFER)
