"""Pairs of prompts as tokens: aligned, with what follows them and where in them a text stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tasks.lists import entries_of, texts_of, whole_numbers
from tasks.text import (
    as_chat,
    encode_all,
    following,
    must_know_all,
    one_token,
    one_word,
    places,
    side_by_side,
    tail,
    typed_at,
    warn_caller,
    with_bos,
)


@dataclass(frozen=True)
class Tokenized:
    """Clean and corrupt prompts as token ids of the same lengths."""

    tokenizer: Any
    typed: list[str]
    """The clean prompts as they were given."""
    texts: list[str]
    """The clean prompts as they were tokenized, in a chat template or not."""
    bare: list[list[int]]
    """Their ids without the beginning-of-sequence token."""
    clean: list[list[int]]
    corrupt: list[list[int]]
    chat: bool

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        clean: list[str],
        corrupt: list[str],
        *,
        prepend_bos: bool,
        chat: bool,
    ) -> Tokenized:
        """Tokenizes both sides; a chat template says itself what stands first.

        Raises:
            ValueError: prompts of a pair have different lengths or the same tokens, or a word is
                unknown.
        """
        sides = (
            [as_chat(tokenizer, side) for side in (clean, corrupt)] if chat else [clean, corrupt]
        )
        rows = [encode_all(tokenizer, side) for side in sides]
        for label, texts, ids in zip(("clean", "corrupt"), sides, rows, strict=True):
            whats = (f"pair {i} of `{label}`" for i in range(len(texts)))
            must_know_all(tokenizer, texts, ids, whats)
        first = prepend_bos and not chat
        made = cls(
            tokenizer=tokenizer,
            typed=clean,
            texts=sides[0],
            bare=rows[0],
            clean=[with_bos(tokenizer, row) for row in rows[0]] if first else rows[0],
            corrupt=[with_bos(tokenizer, row) for row in rows[1]] if first else rows[1],
            chat=chat,
        )
        made._must_align()
        return made

    def _must_align(self) -> None:
        """Refuses a pair whose prompts are empty, of different lengths, or the same."""
        for i, (row, other) in enumerate(zip(self.clean, self.corrupt, strict=True)):
            if not row or not other:
                raise ValueError(
                    f"prompts must have at least one token; pair {i} has {len(row)} and "
                    f"{len(other)}; give both texts, or leave that pair out"
                )
            if len(row) != len(other):
                raise ValueError(
                    f"`corrupt` must tokenize to the length of `clean`: pair {i} has {len(row)} "
                    f"and {len(other)} tokens; choose words of as many tokens:\n"
                    f"{side_by_side(self.tokenizer, row, other)}"
                )
            if row == other:
                raise ValueError(
                    "`corrupt` must differ from `clean`, or nothing can be patched: pair "
                    f"{i} has the same tokens on both sides; change in `corrupt` what the answer "
                    f"hangs on:\n{side_by_side(self.tokenizer, row, other)}"
                )

    def after(
        self, label: str, sets: Sequence[Sequence[str]], *, whole: bool
    ) -> list[list[list[int]]]:
        """The tokens that each answer of each pair adds to its clean prompt.

        `whole`: there may be several; else there must be one.

        Raises:
            ValueError: an answer adds others, or a word is unknown.
        """
        whose = [i for i, answers in enumerate(sets) for _ in answers]
        flat = [answer for answers in sets for answer in answers]
        texts = [self.texts[i] + answer for i, answer in zip(whose, flat, strict=True)]
        rows = encode_all(self.tokenizer, texts)
        must_know_all(self.tokenizer, texts, rows, (f"pair {i} of `{label}`" for i in whose))
        found: list[list[list[int]]] = [[] for _ in sets]
        for i, answer, row in zip(whose, flat, rows, strict=True):
            given = (self.tokenizer, self.texts[i], answer, self.bare[i], row)
            pair = f"`{label}` of pair {i}: "
            found[i].append(following(*given, pair) if whole else [one_token(*given, pair)])
        joined = [at for at in zip(whose, flat, strict=True) if one_word(self.texts[at[0]], at[1])]
        for i, answer in joined[:1]:
            warn_caller(
                f"`{label}` of pair {i} must begin where a word begins; {answer!r} goes on with "
                f"the last word of {tail(self.texts[i])}; give it its leading space "
                f"({' ' + answer!r}), or ignore this if one word is meant"
            )
        return found

    def positions(self, spans: Mapping[str, Any]) -> dict[str, Int[Tensor, " pair"]]:
        """Positions, where a text stands for one: that of its last token in the clean prompt.

        Raises:
            TypeError: a span is neither a text nor a list.
            ValueError: a text is not there exactly once, or does not end where a token ends.
        """
        found: dict[str, Int[Tensor, " pair"]] = {}
        for name, given in spans.items():
            if not isinstance(given, Iterable):
                raise TypeError(
                    f"span {name!r} must be a text, or a list of one text or whole number for each "
                    f"pair; got {given!r}; give a list"
                )
            if not isinstance(given, str):
                entries = given if isinstance(given, Tensor) else entries_of(given)
                if not any(isinstance(entry, str) for entry in entries):
                    found[name] = whole_numbers(entries, f"span {name!r}")
                    continue
            else:
                entries = [given] * len(self.typed)
            wanted = texts_of(entries, f"span {name!r}", len(self.typed))
            starts: Iterable[int] = [0] * len(self.typed)
            if self.chat:
                starts = typed_at(self.tokenizer, self.texts, self.typed)
            typed = list(zip(starts, self.typed, strict=True))
            at = places(self.tokenizer, self.texts, typed, wanted, name)
            first = [len(row) - len(bare) for row, bare in zip(self.clean, self.bare, strict=True)]
            found[name] = torch.tensor(at, device="cpu") + torch.tensor(first, device="cpu")
        return found

    def continued(
        self, follow: Sequence[Sequence[Sequence[int]]]
    ) -> tuple[Tokenized, dict[str, Int[Tensor, " pair"]]]:
        """The same with each answer's tokens but the last behind both prompts, and where these are.

        `end` is where an answer's first token is read, `last` where its last is.

        Raises:
            ValueError: a pair has several answers.
        """
        if any(len(answers) != 1 for answers in follow):
            raise ValueError(
                "`continuation` must get one answer per pair; got a list of several; give the one "
                "that is measured"
            )
        clean, corrupt = (
            [[*row, *answers[0][:-1]] for row, answers in zip(side, follow, strict=True)]
            for side in (self.clean, self.corrupt)
        )
        ends = {
            name: torch.tensor([len(row) - 1 for row in rows], device="cpu")
            for name, rows in (("end", self.clean), ("last", clean))
        }
        return replace(self, clean=clean, corrupt=corrupt), ends


# -- answers of several tokens ---------------------------------------------------------------------


def must_be_continuation(continuation: str | None, metric: Any) -> None:
    """Refuses another way to sum than there is, and two metrics."""
    if continuation not in (None, "sum", "mean"):
        raise ValueError(
            f"`continuation` must be 'sum' or 'mean'; got {continuation!r}; 'mean' is per token, "
            "so that answers of different lengths compare"
        )
    if continuation is not None and metric is not None:
        raise ValueError(
            "`continuation` must go without `metric`: it is one itself; got "
            f"{getattr(metric, '__name__', metric)!r}; leave one out"
        )


def must_be_free(spans: Mapping[str, Any], ends: Mapping[str, Any]) -> None:
    """Refuses spans of a name that a continuation gives its own."""
    if taken := [name for name in ends if name in spans]:
        raise ValueError(
            f"span {taken[0]!r} must be left to `continuation`, which reads from 'end' to "
            "'last'; got one of that name; give it another"
        )
