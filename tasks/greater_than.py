"""Greater-than: a span of years must end later than it began.

"The war lasted from the year 1743 to the year 17" -> any year above 43. Hanna et al. 2023
(arXiv:2305.00586); nouns and verbs are our own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from tasks.prompts import Drawn, chosen, drawn_task, fill, known, words
from tasks.task import Task
from tasks.text import encode, must_be_tokenizer

__all__ = ["greater_than", "known_circuit"]

TEMPLATE = "The {noun} lasted from the year {century}{year}{unit} to the year {end}"
NOUNS = words(
    "war siege dispute project journey campaign strike trial reign famine debate crisis study "
    "mission exile drought protest conflict rebellion festival"
)
CENTURIES = tuple(map(str, range(11, 18)))
ANYWHERE = "_"
"""Before two digits that are one token with each century, as 00 is in GPT-2; so has the source."""
CORRUPTIONS = {"01": "makes every later year right"}
YEARS_NEEDED = 20

Years = dict[tuple[str, str], tuple[list[int], list[int]]]
"""Century and year, and the tokens of what is later and earlier."""

KNOWN = {
    "gpt2": {
        "head": "L0H1 L0H3 L0H5 L5H5 L6H1 L6H9 L7H10 L8H11 L9H1",
        "mlp": "L0.mlp L1.mlp L2.mlp L3.mlp L8.mlp L9.mlp L10.mlp L11.mlp",
    }
}
"""Hanna et al. 2023, arXiv:2305.00586, figure 4."""


def greater_than(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    corruption: str = "01",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Greater-than: answers are the years after the one named, foils it and those before.

    >>> task = greater_than(tokenizer, pairs=4)

    `"01"`, the only corruption, puts year 01 in place of the year, after which every year is right.
    Where the tokenizer makes a year's last two digits one token (GPT-2), answers and foils are all
    two-digit tokens, 00 to 99, as in the paper; where each digit is a token (Llama, SmolLM2,
    Gemma), they are the tens above and below, and the year's own tens, right or wrong by the unit,
    are neither. The metric is `probability_difference`: of all answers minus that of all foils.
    Spans: `year` (its last two digits, or the tens), `century`, `end`.

    Source: Hanna et al. 2023, arXiv:2305.00586.

    Raises:
        ValueError: `pairs` is below 1, there are not so many pairs, `corruption` is unknown, or the
            tokenizer splits no year behind its century (Llama 3, which takes three digits).
        TypeError: `tokenizer` is none.
    """
    chosen(corruption, CORRUPTIONS)
    years, digits = split_years(tokenizer)
    choices = sorted(years)

    def draw(rng: random.Random, _: int) -> Drawn:
        century, year = rng.choice(choices)
        noun = rng.choice(NOUNS)
        clean, corrupt = (
            fill(TEMPLATE, noun=noun, century=century, end=century,
                 **({"year": y[0], "unit": y[1]} if digits else {"year": y, "unit": ""}))
            for y in (year, "01")
        )  # fmt: skip
        later, earlier = years[century, year]
        spans = {"century": "century", "year": "year"}
        return Drawn(clean, corrupt, later, earlier, ("year", "unit"), spans)

    return drawn_task(
        tokenizer,
        draw,
        name="greater_than",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        metric="probability_difference",
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )


def split_years(tokenizer: Any) -> tuple[Years, bool]:
    """The years that are split behind their century, with what is later and earlier; if by digits.

    Raises:
        ValueError: there are too few.
        TypeError: `tokenizer` is none.
    """
    must_be_tokenizer(tokenizer)

    def behind(century: str, year: str) -> list[int]:
        """The tokens of a year behind its century; none if it is none by itself."""
        first, both = (
            encode(tokenizer, f"The year {text}", prepend_bos=False)
            for text in (century, century + year)
        )
        rest = both[len(first) :]
        return rest if first + rest == both and tokenizer.decode(rest) == year else []

    years = [f"{n:02}" for n in range(100)]
    tokens = {(c, y): behind(c, y) for c in (*CENTURIES, ANYWHERE) for y in years}
    for digits in (False, True):
        split = {at: ids for at, ids in tokens.items() if len(ids) == 1 + digits}
        # all that may be said: a year that is one token with its century may be said behind it
        said = dict(sorted((year[: 2 - digits], ids[0]) for (_, year), ids in split.items()))
        found: Years = {}
        for century, year in split:
            sides = _sides(said, year, digits)
            # the corrupt year must be split in the same way
            if century != ANYWHERE and year > "01" and (century, "01") in split and all(sides):
                found[century, year] = sides
        if len(found) >= YEARS_NEEDED:
            return found, digits
    raise ValueError(
        f"the tokenizer must split at least {YEARS_NEEDED} years behind the century, as 17|43 or "
        f"17|4|3; got {sum(map(bool, tokens.values()))} of {len(tokens)}; use another model, or "
        "build the pairs with Task.from_prompts"
    )


def _sides(said: Mapping[str, int], year: str, digits: bool) -> tuple[list[int], list[int]]:
    """The tokens of what is later than a year, and of what is not.

    By digits these are tens, of which a year's own are neither.
    """
    if digits:
        later = [token for ten, token in said.items() if ten > year[0]]
        return later, [token for ten, token in said.items() if ten < year[0]]
    later = [token for other, token in said.items() if other > year]
    return later, [token for other, token in said.items() if other <= year]


def known_circuit(model_name: str) -> dict[str, tuple[str, ...]]:
    """The circuit published for a model: its heads and its MLPs.

    >>> from tasks.greater_than import known_circuit
    >>> known_circuit("gpt2")["mlp"][:2]
    ('L0.mlp', 'L1.mlp')

    Source: Hanna et al. 2023, arXiv:2305.00586.

    Raises:
        ValueError: none is known of this model.
    """
    return known(KNOWN, model_name)
