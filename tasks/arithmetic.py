"""Arithmetic: a sum of two digits, after two worked examples.

"2+3=5, 4+1=5, 3+4=" -> "7". Addition as in Stolfo et al. 2023 (arXiv:2305.15054) and MIB
(arXiv:2504.13151), with results of one digit, which every tokenizer has as one token.
"""

from __future__ import annotations

import random
from typing import Any

from tasks.prompts import Drawn, chosen, drawn_task, fill
from tasks.task import Task

__all__ = ["arithmetic"]

TEMPLATE = "{e1}+{e2}={e3}, {f1}+{f2}={f3}, {x}+{y}="
CORRUPTIONS = {"first": "changes the first number", "second": "changes the second number"}
MOST = 9
"""The largest result."""


def arithmetic(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    corruption: str = "first",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Arithmetic: the answer is the sum of two digits, the foil that of the corrupt prompt.

    >>> task = arithmetic(tokenizer, pairs=4)

    Two other sums stand before, worked out. `"first"` changes the first number and `"second"` the
    second, so that the corrupt prompt's answer is the foil. Spans: `x`, `y`, `end`.

    Source: Stolfo et al. 2023 (arXiv:2305.15054); addition is a task of MIB (arXiv:2504.13151).

    Raises:
        ValueError: `pairs` is below 1, `corruption` is unknown, or the tokenizer does not know or
            does not split digits.
        TypeError: `tokenizer` is none.
    """
    slot = {"first": "x", "second": "y"}[chosen(corruption, CORRUPTIONS)]
    sums = [(x, y) for x in range(1, MOST) for y in range(1, MOST) if x + y <= MOST]

    def draw(rng: random.Random, _: int) -> Drawn:
        (e1, e2), (f1, f2), (x, y) = rng.sample(sums, 3)
        kept = y if slot == "x" else x
        other = rng.choice([n for n in range(1, MOST + 1 - kept) if n != x + y - kept] or [0])
        numbers = {"e1": e1, "e2": e2, "e3": e1 + e2, "f1": f1, "f2": f2, "f3": f1 + f2}
        numbers |= {"x": x, "y": y}
        clean, corrupt = (
            fill(TEMPLATE, **{name: str(n) for name, n in slots.items()})
            for slots in (numbers, numbers | {slot: other})
        )
        return Drawn(clean, corrupt, [str(x + y)], [str(kept + other)], (slot,),
                     {"x": "x", "y": "y"})  # fmt: skip

    return drawn_task(
        tokenizer,
        draw,
        name="arithmetic",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )
