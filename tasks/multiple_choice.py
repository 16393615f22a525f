"""Multiple choice: the letter of the option that the question's first sentence gives.

"A box is brown. What color is the box? A. gray B. brown … Answer:" -> " B". The "copying colors"
questions of Wiegreffe et al. 2024 (arXiv:2407.15018), a task of MIB (arXiv:2504.13151); symbols as
in Lieberum et al. 2023 (arXiv:2307.09458); words are our own.
"""

from __future__ import annotations

import random
from typing import Any

from tasks.colored_objects import COLORS, OBJECTS
from tasks.prompts import Drawn, chosen, drawn_task, fill, whole_words
from tasks.task import Task

__all__ = ["multiple_choice"]

TEMPLATE = """A {object} is {color}. What color is the {object2}?
A. {A}
B. {B}
C. {C}
D. {D}
Answer:"""
LETTERS = "ABCD"
CORRUPTIONS = {
    "options": "swaps the right option with another",
    "color": "gives the object the color of another option",
}


def multiple_choice(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    corruption: str = "options",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Multiple choice: the answer is the letter of the right one of four colors.

    >>> task = multiple_choice(tokenizer, pairs=4)

    `"options"` swaps the right color with that of another letter, the foil, which is then the
    corrupt prompt's answer; `"color"` gives the object that other color instead. Spans: `color`
    (what is said first), `answer` and `foil` (the color behind that letter), `end`.

    Source: Wiegreffe et al. 2024 (arXiv:2407.15018); Mueller et al. 2025 (arXiv:2504.13151).

    Raises:
        ValueError: `pairs` is below 1, `corruption` is unknown, or the tokenizer keeps too few
            colors or objects whole.
        TypeError: `tokenizer` is none.
    """
    chosen(corruption, CORRUPTIONS)
    colors = whole_words(tokenizer, COLORS, least=4, what="colors")
    objects = whole_words(tokenizer, OBJECTS, least=1, what="objects")

    def draw(rng: random.Random, _: int) -> Drawn:
        thing, options = rng.choice(objects), rng.sample(colors, len(LETTERS))
        right, wrong = rng.sample(range(len(LETTERS)), 2)
        swapped = list(options)
        swapped[right], swapped[wrong] = options[wrong], options[right]

        def slots(color: str, options: list[str]) -> dict[str, str]:
            shown = dict(zip(LETTERS, options, strict=True))
            return {"object": thing, "object2": thing, "color": color, **shown}

        by_color = corruption == "color"
        letters = LETTERS[right], LETTERS[wrong]
        return Drawn(
            fill(TEMPLATE, **slots(options[right], options)),
            fill(TEMPLATE, **slots(options[wrong], options) if by_color
                 else slots(options[right], swapped)),
            [f" {letters[0]}"], [f" {letters[1]}"],
            ("color",) if by_color else letters,
            {"color": "color", "answer": letters[0], "foil": letters[1]},
        )  # fmt: skip

    return drawn_task(
        tokenizer,
        draw,
        name="multiple_choice",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )
