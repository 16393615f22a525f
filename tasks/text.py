"""What is asked of a tokenizer: the token ids of texts, and where in a prompt a text stands.

Texts are tokenized many at a time; what follows a prompt is read off both together, so that it is
right for byte-level and for SentencePiece tokenizers alike.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any

CHUNK = 4096
"""Texts that are tokenized in one call: what it returns is large."""
MARK = "\u2402"
"""What stands for a prompt when a chat template is asked where it puts one."""
AROUND = 4
"""Tokens that are shown on either side of where two prompts part."""


# -- the tokenizer ---------------------------------------------------------------------------------


def must_be_tokenizer(tokenizer: Any) -> None:
    """Checks for what is read of a tokenizer: a model, say, can be called on text as well.

    Raises:
        TypeError: it is none.
    """
    methods = ("__call__", "decode", "convert_ids_to_tokens")
    if isinstance(tokenizer, type) or not all(hasattr(tokenizer, name) for name in methods):
        raise TypeError(
            "`tokenizer` must be a Hugging Face tokenizer; "
            f"got {type(tokenizer).__name__}; pass model.tokenizer"
        )


def filling(tokenizer: Any) -> int:
    """A token that every model has and that stands behind the end of a shorter prompt.

    The end-of-text token first: one that was added for padding alone may be in no embedding.
    """
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    found = [getattr(tokenizer, name, None) for name in names]
    return next((int(token) for token in found if isinstance(token, int)), 0)


def must_know(tokenizer: Any, text: str, what: str) -> None:
    """Checks that no word of `text` becomes the unknown token, which stands for any word.

    Raises:
        ValueError: one does.
    """
    must_know_all(tokenizer, [text], encode_all(tokenizer, [text]), [what])


def must_know_all(
    tokenizer: Any, texts: Iterable[str], rows: Iterable[Sequence[int]], whats: Iterable[str]
) -> None:
    """As `must_know`, of texts with their token ids and what they are.

    The unknown token of byte-level tokenizers is their end-of-text token: a text may hold it.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unknown = getattr(tokenizer, "unk_token", None) or getattr(model, "unk_token", None)
    if unknown is None:
        return
    stands_for = tokenizer.convert_tokens_to_ids(unknown)

    def unknowns(text: str, row: Sequence[int]) -> int:
        return list(row).count(stands_for) - text.count(unknown)

    for text, row, what in zip(texts, rows, whats, strict=True):
        if unknowns(text, row) > 0:
            parts = text.split()
            ids = encode_all(tokenizer, parts)
            words = [repr(w) for w, i in zip(parts, ids, strict=True) if unknowns(w, i) > 0]
            raise ValueError(
                f"{what} must be of words that the tokenizer knows; "
                f"{', '.join(words) or repr(text)} in {tail(text)} would be {unknown!r}; choose "
                "other words, or another tokenizer"
            )


# -- ids of texts ----------------------------------------------------------------------------------


def encode(tokenizer: Any, text: str, *, prepend_bos: bool) -> list[int]:
    """Token ids of one text, with the beginning-of-sequence token exactly once if wanted."""
    row = encode_all(tokenizer, [text])[0]
    return with_bos(tokenizer, row) if prepend_bos else row


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without any that the tokenizer would add."""
    rows: list[list[int]] = []
    for i in range(0, len(texts), CHUNK):
        made = tokenizer(
            list(texts[i : i + CHUNK]), add_special_tokens=False, return_attention_mask=False
        )
        rows += made["input_ids"]
    return rows


def with_bos(tokenizer: Any, row: list[int]) -> list[int]:
    """A row with the tokenizer's beginning-of-sequence token first, once, if it has one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos, *row] if bos is not None and row[:1] != [bos] else row


def answer_id(tokenizer: Any, prompt: str, answer: str) -> int:
    """The one token that `answer` adds to `prompt`.

    Raises:
        ValueError: the answer is not exactly one token there.
    """
    before, after = encode_all(tokenizer, [prompt, prompt + answer])
    return one_token(tokenizer, prompt, answer, before, after)


def one_token(
    tokenizer: Any, prompt: str, answer: str, before: list[int], after: list[int], pair: str = ""
) -> int:
    """As `answer_id`, of token ids of the prompt without and with its answer; `pair`: whose."""
    added = following(tokenizer, prompt, answer, before, after, pair)
    if len(added) != 1:
        pieces = tokenizer.convert_ids_to_tokens(added)
        raise ValueError(
            f"{pair}an answer must be exactly one token after its prompt; {answer!r} after "
            f"{tail(prompt)} is {pieces}; choose a word of one token, with its leading space"
            f'{_spaced(answer)}, or read all of it with continuation="sum"'
        )
    return added[0]


def following(
    tokenizer: Any, prompt: str, answer: str, before: list[int], after: list[int], pair: str
) -> list[int]:
    """The tokens that an answer adds to its prompt.

    Raises:
        ValueError: it adds none, or changes those of the prompt.
    """
    if after[: len(before)] != before or len(after) == len(before):
        pieces = tokenizer.convert_ids_to_tokens(after)[-AROUND - 2 :]
        do = f"begin the answer where a token begins, with its leading space{_spaced(answer)}"
        if prompt[-1:] == " ":
            do = "end the prompt before its last space, and begin the answer with one"
        raise ValueError(
            f"{pair}an answer must add tokens to its prompt and leave the prompt's own as they "
            f"are; {tail(prompt)} and {answer!r} together end in {pieces}; {do}"
        )
    return after[len(before) :]


def _spaced(answer: str) -> str:
    """An answer with the space that it lacks, for an error; nothing if it lacks none."""
    return f" ({' ' + answer!r})" if answer and not answer[0].isspace() else ""


def one_word(prompt: str, answer: str) -> bool:
    """True if an answer goes on with the last word of its prompt, in letters of either case."""
    return all(c.isupper() or c.islower() for c in (prompt[-1:], answer[:1]))


# -- chat ------------------------------------------------------------------------------------------


def as_chat(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Each prompt as what a user says, in the tokenizer's template, up to the model's turn.

    Raises:
        ValueError: the tokenizer has no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(
            f"`chat` must get a tokenizer with a chat template; {name!r} has none; leave `chat` "
            "out, or set tokenizer.chat_template"
        )
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]


def typed_at(tokenizer: Any, chats: Sequence[str], prompts: Sequence[str]) -> list[int]:
    """Where in each chat the prompt begins, which a template may have cut at its ends.

    Raises:
        ValueError: the template changed a prompt in another way.
    """
    head = as_chat(tokenizer, [MARK])[0].partition(MARK)[0]
    starts = []
    for i, (chat, prompt) in enumerate(zip(chats, prompts, strict=True)):
        if not chat.startswith(head + prompt.strip()) and not chat.startswith(head + prompt):
            raise ValueError(
                f"spans must be positions where the chat template changes a prompt; pair {i} has "
                f"{tail(chat, 80)} for {tail(prompt)}; give whole numbers, counted in the template"
            )
        cut = 0 if chat.startswith(head + prompt) else len(prompt) - len(prompt.lstrip())
        starts.append(len(head) - cut)
    return starts


# -- where a text stands ---------------------------------------------------------------------------


def places(
    tokenizer: Any,
    prompts: Sequence[str],
    typed: Sequence[tuple[int, str]],
    wanted: Sequence[str],
    name: str,
) -> list[int]:
    """The position of the last token of a text in each prompt, without any first token added.

    Args:
        tokenizer: one that knows where in the text its tokens stand.
        prompts: what is tokenized.
        typed: the part of each that is searched, and where in it that begins.
        wanted: the text of each.
        name: what the position is called.

    Raises:
        ValueError: a text is not there exactly once, or does not end where a token ends.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"span {name!r} must be given as positions: {type(tokenizer).__name__} does not tell "
            "where in a text its tokens stand; give one whole number per pair, or use a fast "
            "tokenizer"
        )
    found: list[int] = []
    for i in range(0, len(prompts), CHUNK):
        part = list(prompts[i : i + CHUNK])
        made = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        for offsets in made["offset_mapping"]:
            k = len(found)
            end = _end(*typed[k], wanted[k], f"span {name!r} of pair {k}")
            if prompts[k][: max(end, 0)][-len(wanted[k]) :] != wanted[k]:
                raise ValueError(
                    f"span {name!r} of pair {k} must stand in the chat as it was typed; the "
                    f"template cuts {wanted[k]!r}; leave out spaces at the prompt's ends"
                )
            ends = [pos for pos, (_, last) in enumerate(offsets) if last == end]
            if not ends:
                inside = next((prompts[k][a:b] for a, b in offsets if a < end <= b), "no token")
                raise ValueError(
                    f"span {name!r} of pair {k} must end where a token ends; {wanted[k]!r} ends "
                    f"inside {inside!r}; give the text up to that token's end"
                )
            found.append(ends[-1])
    return found


def _end(start: int, typed: str, wanted: str, what: str) -> int:
    """Where a text ends that stands once in what was typed, which begins at `start`."""
    first = typed.find(wanted) if wanted else -1
    if first < 0:
        raise ValueError(
            f"{what} must stand in its clean prompt; {wanted!r} is not in {tail(typed, 80)}; "
            "check its letters and spaces"
        )
    if first != typed.rfind(wanted):
        times = max(2, typed.count(wanted))
        raise ValueError(
            f"{what} must stand once in its clean prompt; {wanted!r} is there {times} times, in "
            f"{tail(typed, 80)}; give more of what stands before the one you mean, as in ', John'"
        )
    return start + first + len(wanted)


# -- for messages --------------------------------------------------------------------------------


def side_by_side(tokenizer: Any, clean: Sequence[int], corrupt: Sequence[int]) -> str:
    """Two lines, the tokens of both prompts under each other, around where their lengths part."""
    one, two = (list(tokenizer.convert_ids_to_tokens(list(row))) for row in (clean, corrupt))
    columns: list[tuple[str, str]] = []
    for _, a, b, c, d in SequenceMatcher(None, one, two, autojunk=False).get_opcodes():
        columns += zip_longest(one[a:b], two[c:d], fillvalue="")
    parted = next((i for i, column in enumerate(columns) if "" in column), 0)
    start, stop = max(0, parted - AROUND), min(len(columns), parted + AROUND + 1)
    shown = columns[start:stop]
    lines = []
    for label, cells in zip(("clean  ", "corrupt"), zip(*shown, strict=True), strict=True):
        widths = [max(map(len, column)) for column in shown]
        padded = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)]
        first, last = "…|" * (start > 0), "|…" * (stop < len(columns))
        lines.append(f"  {label}|{first}{'|'.join(padded)}{last}|")
    return "\n".join(lines)


def tail(text: str, length: int = 24) -> str:
    """The end of a text, for a message."""
    return repr(text if len(text) <= length else "…" + text[-length:])


def warn_caller(message: str) -> None:
    """Warns, with the line outside of this room that has led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "tasks":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
