"""Colored objects: of several things on a table, the color of the one that is asked for.

"My pen is red, my cup is blue and my book is green. So the cup is" -> " blue", not " red".
After the task of that name in BIG-bench (arXiv:2206.04615) and Merullo et al. 2023
(arXiv:2310.08744), who show that it shares a circuit with IOI; words are our own.
"""

from __future__ import annotations

import random
from typing import Any

from tasks.prompts import Drawn, chosen, drawn_task, fill, whole_words, words
from tasks.task import Task

__all__ = ["colored_objects"]

TEMPLATE = "{Whose} {o1} is {c1}, {whose} {o2} is {c2} and {whose2} {o3} is {c3}. So the {asked} is"
OWNERS = words("my his her our their your")
COLORS = words("red blue green yellow black white brown pink gray purple")
OBJECTS = words("pen cup book ball hat bag shirt plate box chair lamp bottle phone key toy")
CORRUPTIONS = {
    "flip": "asks for another of the three",
    "colors": "swaps the colors of two of them",
}


def colored_objects(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    corruption: str = "flip",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Colored objects: the answer is the asked object's color, the foil that of another.

    >>> task = colored_objects(tokenizer, pairs=4)

    `"flip"` asks for the other object, so that the corrupt prompt's answer is the foil; `"colors"`
    swaps the two colors instead. Spans: `color` and `object` (of what is asked for, in the list),
    `other color`, `asked` (the object in the question), `end`.

    Source: Srivastava et al. 2022 (arXiv:2206.04615), Merullo et al. 2023 (arXiv:2310.08744).

    Raises:
        ValueError: `pairs` is below 1, `corruption` is unknown, or the tokenizer keeps too few
            colors or objects whole.
        TypeError: `tokenizer` is none.
    """
    chosen(corruption, CORRUPTIONS)
    colors = whole_words(tokenizer, COLORS, least=4, what="colors")
    objects = whole_words(tokenizer, OBJECTS, least=5, what="objects")

    def draw(rng: random.Random, _: int) -> Drawn:
        owner = rng.choice(OWNERS)
        things, shades = rng.sample(objects, 3), rng.sample(colors, 3)
        asked, other = rng.sample(range(3), 2)
        swapped = list(shades)
        swapped[asked], swapped[other] = shades[other], shades[asked]
        flip = corruption == "flip"

        def slots(shades: list[str], thing: str) -> dict[str, str]:
            listed = {f"o{i}": o for i, o in enumerate(things, 1)}
            whose = {"Whose": owner.title(), "whose": owner, "whose2": owner}
            colors = {f"c{i}": c for i, c in enumerate(shades, 1)}
            return {"asked": thing, **whose, **listed, **colors}

        return Drawn(
            fill(TEMPLATE, **slots(shades, things[asked])),
            fill(TEMPLATE, **slots(shades if flip else swapped, things[other if flip else asked])),
            [f" {shades[asked]}"], [f" {shades[other]}"],
            ("asked",) if flip else (f"c{asked + 1}", f"c{other + 1}"),
            {"color": f"c{asked + 1}", "object": f"o{asked + 1}", "other color": f"c{other + 1}",
             "asked": "asked"},
        )  # fmt: skip

    return drawn_task(
        tokenizer,
        draw,
        name="colored_objects",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )
