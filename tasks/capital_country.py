"""Capitals: recall of a fact.

"The capital of France is" -> " Paris", not " Rome". Factual recall as in Meng et al. 2022
(arXiv:2202.05262) and Merullo et al. 2023 (arXiv:2305.16130); sentences are our own.
"""

from __future__ import annotations

import random
from typing import Any

from tasks.prompts import Drawn, chosen, drawn_task, fill, whole_groups
from tasks.task import Task

__all__ = ["capital_country"]

TEMPLATES = (
    "The capital of {country} is",
    "The capital city of {country} is called",
    "We went to {country} and visited its capital,",
    "If you travel to {country}, the capital that you will see is",
    "Everyone knows that the capital of {country} is",
)
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "England": "London", "Ireland": "Dublin",
    "Greece": "Athens", "Egypt": "Cairo", "Austria": "Vienna", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen",
    "Finland": "Helsinki", "Hungary": "Budapest", "Belgium": "Brussels", "Turkey": "Ankara",
    "Iraq": "Baghdad", "Iran": "Tehran", "Syria": "Damascus", "Kenya": "Nairobi", "Cuba": "Havana",
    "Thailand": "Bangkok", "Canada": "Ottawa", "Ukraine": "Kiev", "Scotland": "Edinburgh",
    "Peru": "Lima", "Chile": "Santiago", "Qatar": "Doha", "Lebanon": "Beirut", "Taiwan": "Taipei",
}  # fmt: skip
CORRUPTIONS = {"flip": "names another country"}
NEEDED = 4


def capital_country(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    corruption: str = "flip",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Capitals: the answer is the country's capital, the foil that of another country.

    >>> task = capital_country(tokenizer, pairs=4)

    `"flip"`, the only corruption, names the other country, so that the corrupt prompt's answer is
    the foil. Countries are those that are one token, as their capital is. Spans: `country`, `end`.

    Source: recall of facts as in Meng et al. 2022 (arXiv:2202.05262) and Merullo et al. 2023
    (arXiv:2305.16130).

    Raises:
        ValueError: `pairs` is below 1, there are not so many pairs, `corruption` is unknown, or the
            tokenizer keeps fewer than four countries and their capitals whole.
        TypeError: `tokenizer` is none.
    """
    chosen(corruption, CORRUPTIONS)
    both = whole_groups(
        tokenizer, [*CAPITALS.items()], least=NEEDED, what="countries, each with its capital,"
    )

    def draw(rng: random.Random, _: int) -> Drawn:
        template = rng.choice(TEMPLATES)
        (own, answer), (other, foil) = rng.sample(both, 2)
        clean, corrupt = (fill(template, country=country) for country in (own, other))
        return Drawn(
            clean, corrupt, [f" {answer}"], [f" {foil}"], ("country",), {"country": "country"}
        )

    return drawn_task(
        tokenizer,
        draw,
        name="capital_country",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )
