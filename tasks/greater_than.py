"""Greater-than: a span of years must end later than it began.

"The war lasted from the year 1743 to the year 17" -> any year above 43. Hanna et al. 2023
(arXiv:2305.00586); nouns and verbs are our own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
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
CORRUPTIONS = {"01": "makes every later year right"}
YEARS_NEEDED = 20

Years = dict[tuple[str, str], tuple[list[str], list[str]]]
"""Century and year, and what is later and earlier."""

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
    two-digit tokens, as in the paper; where each digit is a token (Llama, SmolLM2, Gemma), they are
    the tens above and below, and the year's own tens, right or wrong by the unit, are neither. The
    metric is `probability_difference`: of all answers minus that of all foils. Spans: `year` (its
    last two digits, or the tens), `century`, `end`.

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
        tokenizer, draw, name="greater_than", pairs=pairs, seed=seed,
        metric="probability_difference", mixed_lengths=mixed_lengths, prepend_bos=prepend_bos,
    )  # fmt: skip


def split_years(tokenizer: Any) -> tuple[Years, bool]:
    """The years whose century is whole tokens, with what comes later and earlier; if by digits.

    Raises:
        ValueError: there are too few.
        TypeError: `tokenizer` is none.
    """
    must_be_tokenizer(tokenizer)

    def behind(century: str, year: str) -> int:
        """How many tokens a year is behind its century; 0 if it is none by itself."""
        first, both = (
            encode(tokenizer, f"The year {text}", prepend_bos=False)
            for text in (century, century + year)
        )
        whole = both[: len(first)] == first and tokenizer.decode(both[len(first) :]) == year
        return (len(both) - len(first)) * whole

    tokens = {(c, y): behind(c, y) for c in CENTURIES for y in [f"{n:02}" for n in range(1, 100)]}
    for digits in (False, True):
        found: Years = {}
        for century in CENTURIES:
            years = [y for c, y in tokens if c == century and tokens[c, y] == 1 + digits]
            if "01" in years:  # the corrupt year must be split in the same way
                found |= {(century, year): sides for year, sides in _sides(years, digits)}
        if len(found) >= YEARS_NEEDED:
            return found, digits
    raise ValueError(
        f"the tokenizer must split at least {YEARS_NEEDED} years behind the century, as 17|43 or "
        f"17|4|3; got {sum(map(bool, tokens.values()))} of {len(tokens)}; use another model, or "
        "build the pairs with Task.from_prompts"
    )


def _sides(years: Sequence[str], digits: bool) -> Iterator[tuple[str, tuple[list[str], list[str]]]]:
    """Each year that leaves some on both sides, with what is later and what is not.

    By digits these are tens, of which a year's own are neither.
    """
    for year in years:
        if digits:
            tens = sorted({y[0] for y in years})
            later = [ten for ten in tens if ten > year[0]]
            earlier = [ten for ten in tens if ten < year[0]]
        else:
            later, earlier = [y for y in years if y > year], [y for y in years if y <= year]
        if later and earlier and year != "01":
            yield year, (later, earlier)


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
