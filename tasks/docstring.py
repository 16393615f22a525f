"""Docstrings: which argument of a Python function is described next.

"def port(self, load, size, file, last): … :param load: … :param size: … :param" -> " file".
Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only
transformer"; words are our own.
"""

from __future__ import annotations

import random
from typing import Any

from tasks.prompts import Drawn, chosen, drawn_task, fill, known, whole_words, words
from tasks.task import Task

__all__ = ["docstring", "known_circuit"]

TEMPLATE = '''def {function}(self, {a}, {b}, {c}, {d}):
    """{w1} {w2} {w3}

    :param {a2}: {w4} {w5}
    :param {b2}: {w6} {w7}
    :param'''
WORDS = words(
    "load size file last port name test data list line time date user path color width order count "
    "state model text image field group level point table value index score price key new old page "
    "code item area city book game team word year sound light water power room"
)
CORRUPTIONS = {
    "flip": "swaps the answer with the argument behind it",
    "definition": "renames all arguments in the definition",
}
WORDS_NEEDED = 16
"""A function, four arguments and four others, seven words of description."""

KNOWN = {"attn-only-4l": {"head": "L0H2 L0H4 L0H5 L1H2 L1H4 L2H0 L3H0 L3H6"}}
"""Heimersheim and Janiak 2023; a model of TransformerLens."""


def docstring(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    corruption: str = "flip",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Docstrings: the answer is the third argument of a function, after two are described.

    >>> task = docstring(tokenizer, pairs=4)

    `"flip"` swaps the third and the fourth argument in the definition, so that the corrupt prompt's
    answer is the foil. `"definition"` renames all four there, so that the description has nothing
    to go by ("random def" of the source). Spans: `A` to `D` (the arguments in the definition), `A2`
    and `B2` (in the description), `end`.

    Source: Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer
    attention-only transformer", whose foil is the likeliest of all wrong arguments; here it is the
    one behind the answer.

    Raises:
        ValueError: `pairs` is below 1, `corruption` is unknown, or the tokenizer keeps fewer than
            sixteen words whole.
        TypeError: `tokenizer` is none.
    """
    chosen(corruption, CORRUPTIONS)
    pool = whole_words(tokenizer, WORDS, least=WORDS_NEEDED, what="words")

    def draw(rng: random.Random, _: int) -> Drawn:
        function, *rest = rng.sample(pool, WORDS_NEEDED)
        own, others, filler = rest[:4], rest[4:8], rest[8:]
        changed = [own[0], own[1], own[3], own[2]] if corruption == "flip" else others
        shared = {f"w{i}": word for i, word in enumerate(filler, 1)}
        shared |= {"function": function, "a2": own[0], "b2": own[1]}
        clean, corrupt = (
            fill(TEMPLATE, **dict(zip("abcd", names, strict=True)), **shared)
            for names in (own, changed)
        )
        slots = "cd" if corruption == "flip" else "abcd"
        spans = {"A": "a", "B": "b", "C": "c", "D": "d", "A2": "a2", "B2": "b2"}
        return Drawn(clean, corrupt, [f" {own[2]}"], [f" {own[3]}"], tuple(slots), spans)

    return drawn_task(
        tokenizer,
        draw,
        name="docstring",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )


def known_circuit(model_name: str) -> dict[str, tuple[str, ...]]:
    """The circuit published for a model: its heads.

    >>> from tasks.docstring import known_circuit
    >>> len(known_circuit("attn-only-4l")["head"])
    8

    Source: Heimersheim and Janiak 2023.

    Raises:
        ValueError: none is known of this model.
    """
    return known(KNOWN, model_name)
