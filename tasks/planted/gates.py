"""AND and OR: what one direction of patching sees, the other does not.

    sunny holiday ?  ->  yes, rather than no

    embed --v--> L0H0 (weather) --\
                                   L0.mlp (gate) --> logits
    embed --v--> L0H1 (day)     --/

Clean prompts have both inputs, corrupt ones none. From the corrupt run (denoise), putting one input
of AND back does nothing, but one of OR suffices; from the clean run (noise), taking one input of
AND away breaks it, and OR still has the other. So the inputs of AND show by noise alone, and those
of OR by denoise alone.

Source: Heimersheim & Nanda 2024, arXiv:2404.15255.
"""

from __future__ import annotations

import random

from tasks.planted.factory import Pair, Plan, circuit
from tasks.planted.stream import Head, Neuron, Stream
from tasks.planted.weights import Wiring

__all__ = ["and_gate", "or_gate"]

FINE, FOUL = ("sunny", "warm", "clear"), ("rainy", "cold", "cloudy")
FREE, BUSY = ("holiday", "weekend", "vacation"), ("workday", "weekday", "deadline")
YES, NO = "yes", "no"


@circuit
def and_gate(rng: random.Random, pairs: int) -> Plan:
    """An AND of two inputs (Llama): each is needed, so that restoring one alone does nothing.

    Built to break denoising, exact patching included.

    >>> planted.and_gate(pairs=4).direction
    'noise'
    """
    return _gate(rng, pairs, "and")


@circuit
def or_gate(rng: random.Random, pairs: int) -> Plan:
    """An OR of two inputs (Llama): each suffices, so that taking one away does nothing.

    Built to break noising, exact patching included.

    >>> planted.or_gate(pairs=4).direction
    'denoise'
    """
    return _gate(rng, pairs, "or")


def _gate(rng: random.Random, pairs: int, kind: str) -> Plan:
    words = FINE + FOUL + FREE + BUSY
    s = Stream(token=(*words, "?", YES, NO), weather=1, day=1, fine=1, free=1, a=1, b=1, gate=1)
    says = dict.fromkeys(FINE, s["weather"] + s["fine"]) | dict.fromkeys(FOUL, s["weather"])
    says |= dict.fromkeys(FREE, s["day"] + s["free"]) | dict.fromkeys(BUSY, s["day"])
    both = s["a"] + s["b"]
    gate = {  # 1 if both are there; or 1 less than at first, if none is
        "and": Neuron(0, reads=both - 1.5 * s["one"], writes=2 * s["gate"]),
        "or": Neuron(0, reads=0.5 * s["one"] - both, writes=-2 * s["gate"]),
    }[kind]
    wiring = Wiring(
        "llama",
        s,
        heads=[
            Head("L0H0", s["one"], s["weather"], value=s["fine"], out=s["a"]),
            Head("L0H1", s["one"], s["day"], value=s["free"], out=s["b"]),
        ],
        neurons=[gate],
        says=says,
        logits={YES: 12 * s["gate"] + {"and": -6, "or": 6}[kind] * s["one"]},
    )
    return Plan(
        wiring,
        [_pair(rng) for _ in range(pairs)],
        edges=["embed->L0H0.v", "embed->L0H1.v", "L0H0->L0.mlp.in", "L0H1->L0.mlp.in",
               "L0.mlp->logits.in"],
        direction={"and": "noise", "or": "denoise"}[kind],
        about={
            "and": "denoising: an AND needs both inputs, putting one back does nothing",
            "or": "noising: an OR needs one input, taking one away does nothing",
        }[kind],
    )  # fmt: skip


def _pair(rng: random.Random) -> Pair:
    swapped = rng.random() < 0.5

    def text(weather: tuple[str, ...], day: tuple[str, ...]) -> str:
        inputs = [rng.choice(weather), rng.choice(day)]
        return " ".join([*(reversed(inputs) if swapped else inputs), "?"])

    return Pair(text(FINE, FREE), text(FOUL, BUSY), answer=YES, foil=NO)
