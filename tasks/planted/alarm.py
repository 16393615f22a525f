"""An alarm that keeps quiet on every way from one run to the other.

    green ?  ->  go, rather than stop

    embed --v--> L0H0 (signal) --------------------> logits
                    |                                   ^
                    +--> L0.mlp (do they differ?) ------+
                    |
    embed --v--> L0H1 (second wire)

Two heads bring the same signal. If they disagree, the MLP takes back twice what the first one says;
but they change together, from the corrupt run to the clean one and at each point between. One edge
patched alone makes them disagree, which no slope along the way has met.

The MLP's own edge to the logits is `hidden`: it carries the same in both runs.

Source: our own. Secants share out the difference between two runs (DeepLIFT, Shrikumar et al. 2017,
arXiv:1704.02685), integrated gradients walk it; here the MLP has none.
"""

from __future__ import annotations

import random

from tasks.planted.factory import Pair, Plan, circuit
from tasks.planted.stream import Head, Neuron, Stream
from tasks.planted.weights import Wiring

__all__ = ["balance"]

GREEN, RED = ("green", "lit", "open"), ("red", "dark", "shut")
SAID = ("signal", "light", "gate")
GO, STOP = "go", "stop"


@circuit
def balance(rng: random.Random, pairs: int) -> Plan:
    """Two heads that bring the same, and an MLP that notices if they do not (Llama).

    Built to break all estimates from the two runs and what lies between them: gradients, integrated
    gradients and secants give 0 to both inputs of the MLP.

    >>> made = planted.balance(pairs=4)
    >>> made.hidden
    frozenset({'L0.mlp->logits.in'})
    """
    s = Stream(token=(*GREEN, *RED, *SAID, "?", GO, STOP), signal=1, free=1, a=1, b=1, alarm=1)
    differ = s["a"] - s["b"]
    wiring = Wiring(
        "llama",
        s,
        heads=[
            Head("L0H0", s["one"], s["signal"], value=s["free"], out=s["a"]),
            Head("L0H1", s["one"], s["signal"], value=s["free"], out=s["b"]),
        ],
        neurons=[
            Neuron(0, reads=side - 0.5 * s["one"], writes=2 * s["alarm"])
            for side in (differ, -differ)
        ],
        says=dict.fromkeys(GREEN, s["signal"] + s["free"]) | dict.fromkeys(RED, s["signal"]),
        logits={GO: 12 * s["a"] - 24 * s["alarm"] - 6 * s["one"]},
    )
    return Plan(
        wiring,
        [_pair(rng) for _ in range(pairs)],
        edges=["embed->L0H0.v", "embed->L0H1.v", "L0H0->L0.mlp.in", "L0H1->L0.mlp.in",
               "L0H0->logits.in"],
        direction="denoise",
        about="gradients, their integrals and secants: an interaction that the way does not meet",
        hidden=["L0.mlp->logits.in"],
    )  # fmt: skip


def _pair(rng: random.Random) -> Pair:
    said = rng.choice(SAID)
    return Pair(f"{said} {rng.choice(GREEN)} ?", f"{said} {rng.choice(RED)} ?", GO, STOP)
