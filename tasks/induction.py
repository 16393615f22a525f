"""Induction: a list of words comes again, and what followed a word follows it once more.

"… tree lamp road … tree" -> " lamp". Olsson et al. 2022 (arXiv:2209.11895); words are our own.
"""

from __future__ import annotations

import random
from typing import Any

from tasks.ioi import NAMES, OBJECTS, PLACES
from tasks.prompts import Drawn, chosen, drawn_task, fill, whole_words, words
from tasks.task import Task

__all__ = ["induction"]

WORDS = (
    *NAMES, *OBJECTS, *PLACES,
    *words(
        "tree road river stone cloud horse table chair window door paper money water fire wind "
        "snow train ship plane bridge wall floor roof glass coin knife spoon plate bread salt"
    ),
)  # fmt: skip
LONGEST = 12
WORDS_NEEDED = 2 * LONGEST
CORRUPTIONS = {
    "flip": "lets another word follow the first time",
    "prefix": "lets another word stand before the answer, so that there is nothing to repeat",
}


def induction(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    corruption: str = "flip",
    length: int = 8,
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Induction: the answer is the word that followed the last one before, foil a word of no list.

    >>> task = induction(tokenizer, pairs=4)

    `length` random words and, after a comma, their repetition up to one of them. `"flip"` puts the
    foil in the answer's place in the first list, so that the corrupt prompt's answer is the foil;
    `"prefix"` puts another word before the answer there, so that the last word of the prompt never
    came before. Spans: `first` (the word that comes again), `answer` (behind it, in the first
    list), `end`. No list of heads: `transformer_lens.head_detector` finds those of any model.

    Source: Olsson et al. 2022, arXiv:2209.11895.

    Raises:
        ValueError: `pairs` is below 1, `corruption` is unknown, `length` is not from 3 to 12, or
            the tokenizer keeps fewer than 24 words whole.
        TypeError: `tokenizer` is none.
    """
    chosen(corruption, CORRUPTIONS)
    if not 3 <= length <= LONGEST:
        raise ValueError(
            f"`length` must be from 3 to {LONGEST} words; got {length}; a list needs words before "
            "and behind the pair that comes again"
        )
    pool = whole_words(tokenizer, WORDS, least=WORDS_NEEDED, what="common words")

    def draw(rng: random.Random, _: int) -> Drawn:
        *listed, foil, other = rng.sample(pool, length + 2)
        at = rng.randrange(1, length - 1)
        first, answer = listed[at], listed[at + 1]
        rest = " ".join(listed[:at] + ["{first}", "{answer}"] + listed[at + 2 :])
        template = f"List: {rest}, {' '.join(listed[: at + 1])}"
        change = {"answer": foil} if corruption == "flip" else {"first": other}
        words = {"first": first, "answer": answer}
        return Drawn(
            fill(template, **words), fill(template, **words | change), [f" {answer}"], [f" {foil}"],
            tuple(change), {"first": "first", "answer": "answer"},
        )  # fmt: skip

    return drawn_task(
        tokenizer,
        draw,
        name="induction",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )
