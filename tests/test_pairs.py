"""Pairs as they are typed and read: spans by text, chat templates, rows of different lengths."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_ioi import gpt2, llama
from test_task import full_message, mixed
from transformers import PreTrainedTokenizerFast

from tasks import Pair, Task, ioi

CLEAN = ["When Mary and John went to the store, John gave a drink to", "Then Tom smiled at"]
CORRUPT = ["When Mary and John went to the store, Mary gave a drink to", "Then Paul smiled at"]
LISTS: list[Any] = [CLEAN, CORRUPT, [" Mary", " Tom"], [" John", " Paul"]]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module", params=[gpt2, llama], ids=["byte-level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param()


def talking(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of its own: the others are shared."""
    tokenizer = copy.deepcopy(gpt2())
    tokenizer.chat_template = template
    return tokenizer


# -- spans -----------------------------------------------------------------------------------------


def test_spans_are_found_by_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    spans = {
        "IO": ["Mary", "Tom"],
        "S2": [", John", "smiled"],
        "last": [" drink to", "at"],
        "start": [0, 1],
        "and": np.array([3, 2]),
    }
    task = Task.from_prompts(tokenizer, *LISTS, spans=spans)
    bare = Task.from_prompts(tokenizer, *LISTS, spans=spans, prepend_bos=False)
    for i, (io, s2, last) in enumerate(zip(*(spans[n] for n in ("IO", "S2", "last")), strict=True)):
        for name, text in (("IO", io), ("S2", s2), ("last", last)):
            at = int(task.spans[name][i])
            ids = tokenizer(CLEAN[i], add_special_tokens=False).input_ids
            read = tokenizer.decode(ids[:at])  # the first token is that of the beginning
            assert read.endswith(text) and CLEAN[i].startswith(read)
            assert int(bare.spans[name][i]) == at - 1
    assert task.spans["last"].tolist() == task.spans["end"].tolist()
    assert task.spans["start"].tolist() == [0, 1] and task.spans["and"].tolist() == [3, 2]
    one = Task.from_prompts(
        tokenizer, CLEAN[1:], CORRUPT[1:], [" Tom"], [" Paul"], spans={"verb": "smiled"}
    )
    assert one.spans["verb"].tolist() == task.spans["S2"].tolist()[1:]


@pytest.mark.usefixtures("annotations_unchecked")
def test_a_span_is_a_text_or_a_list() -> None:
    with pytest.raises(
        TypeError, match=r"^span 'S' must be a text, or a list .* got 5; give a list"
    ):
        Task.from_prompts(gpt2(), *LISTS, spans={"S": 5})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["John", "Tom"],
            "span 'S' of pair 0 must stand once in its clean prompt; 'John' is there 2 times, in "
            "'When Mary and John went to the store, John gave a drink to'; give more of what "
            "stands before the one you mean, as in ', John'",
        ),
        (
            ["Mary", "tom"],
            "span 'S' of pair 1 must stand in its clean prompt; 'tom' is not in 'Then Tom smiled "
            "at'; check its letters and spaces",
        ),
        (
            ["Mar", "Tom"],
            "span 'S' of pair 0 must end where a token ends; 'Mar' ends inside ' Mary'; give the "
            "text up to that token's end",
        ),
        (
            ["", "Tom"],
            "span 'S' of pair 0 must stand in its clean prompt; '' is not in 'When Mary and John "
            "went to the store, John gave a drink to'; check its letters and spaces",
        ),
        (
            ["Mary"],
            "`span 'S'` must be a list of 2 texts, one per pair; got 1; give clean, corrupt, "
            "answers and foils lists of one length",
        ),
    ],
    ids=["twice", "missing", "inside", "empty", "too few"],
)
def test_spans_that_are_not_there(given: list[str], message: str) -> None:
    assert full_message(lambda: Task.from_prompts(gpt2(), *LISTS, spans={"S": given})) == message


def test_texts_that_overlap_are_there_twice() -> None:
    prompts = ["Then a a a went"], ["Then a a the went"]
    with pytest.raises(ValueError, match="' a a' is there 2 times"):
        Task.from_prompts(gpt2(), *prompts, [" to"], [" at"], spans={"S": " a a"})


def test_tokens_of_part_of_a_character_end_where_it_ends() -> None:
    tokenizer = gpt2()
    task = Task.from_prompts(
        tokenizer, ["Then 漢 Tom went"], ["Then 漢 Paul went"], [" to"], [" at"], spans={"x": "漢"}
    )
    before = tokenizer("Then 漢", add_special_tokens=False).input_ids
    assert int(task.spans["x"]) == len(before) and len(before) > 3
    assert task[0].clean == "Then 漢 Tom went"


def test_slow_tokenizers_do_not_tell_where_tokens_stand() -> None:
    class Slow:
        is_fast = False

        def __init__(self) -> None:
            self.fast = gpt2()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.fast, name)

        def __call__(self, *given: Any, **options: Any) -> Any:
            return self.fast(*given, **options)

    tokenizer = Slow()
    assert Task.from_prompts(tokenizer, *LISTS, spans={"S": [1, 1]}).spans["S"].tolist() == [1, 1]
    assert "span 'S' must be given as positions: Slow does not tell" in full_message(
        lambda: Task.from_prompts(tokenizer, *LISTS, spans={"S": ["Mary", "Tom"]})
    )


# -- reading ---------------------------------------------------------------------------------------


def test_a_pair_is_what_was_typed(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = [[" Mary"], [" Tom", " Mary"]]
    task = Task.from_prompts(
        tokenizer, CLEAN, CORRUPT, answers, LISTS[3], spans={"IO": ["Mary", "Tom"]}
    )
    pairs = list(task)
    assert [p.clean for p in pairs] == CLEAN and [p.corrupt for p in pairs] == CORRUPT
    assert [list(p.answers) for p in pairs] == answers
    assert [p.foils for p in pairs] == [(" John",), (" Paul",)]
    assert [p.spans["IO"] for p in pairs] == [(" Mary", 2), (" Tom", 2)]
    typed = [[getattr(p, n) for p in pairs] for n in ("clean", "corrupt", "answers", "foils")]
    again = Task.from_prompts(tokenizer, *typed)
    assert torch.equal(again.clean, task.clean) and torch.equal(again.answers, task.answers)
    with pytest.raises(AttributeError):
        pairs[0].clean = "other"  # type: ignore[misc]
    assert repr(pairs[1]).startswith("Pair(clean='Then Tom smiled at', corrupt='Then Paul smiled")


@pytest.mark.usefixtures("annotations_unchecked")
def test_pairs_are_asked_for_as_in_a_list() -> None:
    task = mixed(name="mix")
    assert task[3] == task[-3] == task[np.int64(3)] == task[torch.tensor(3)] == list(task)[3]
    assert task[3] == Pair((13, 0, 1, 2), (2, 1, 0, 13), (3,), (9,), {"end": (2, 3)})
    for part, rows in ((task[2:5], [2, 3, 4]), (task[::-2], [5, 3, 1]), (task[4:99], [4, 5])):
        assert isinstance(part, Task) and part.answers.tolist() == rows
    assert len(list(task)) == 6
    for at in (6, -7):
        with pytest.raises(IndexError) as error:
            task[at]
        assert str(error.value) == (
            f"task 'mix' has pairs 0 to 5; got {at}; count from 0, or from the end with negative "
            "numbers"
        )
    assert full_message(lambda: task[[0, 1]], TypeError) == (  # type: ignore[call-overload]
        "pairs must be asked for by one whole number or a slice; got list; use task.select for a "
        "list of numbers or a mask"
    )
    assert "a selection must keep at least one pair" in full_message(lambda: task[3:3])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_read_as_the_first(again: Any) -> None:
    task = ioi(gpt2(), pairs=2, mixed_lengths=True)
    assert list(again(task)) == list(task) and again(task[0]) == task[0]
    assert again(task)._repr_html_() == task._repr_html_()


def test_a_notebook_shows_tokens_and_what_differs() -> None:
    task = Task.from_prompts(
        gpt2(), ["Then <b> Tom & went"], ["Then <b> John & went"], [" to"], [" at"],
        spans={"who": "Tom"}, name="<i>",
    )  # fmt: skip
    html = task._repr_html_()
    assert html.count("background") == 2 * sum(
        a != b for a, b in zip(task.clean[0], task.corrupt[0], strict=True)
    )
    assert "<b>" not in html and "<i>" not in html and "&lt;i&gt;" in html and "&amp;" in html
    assert ">who</th>" in html and "answers: &#x27; to&#x27;; foils: &#x27; at&#x27;" in html
    bare = mixed()._repr_html_()
    assert ">14<" not in bare and ">13<" in bare and "… and 2 pairs more" in bare


def test_tokens_that_would_not_be_seen_are_spelled() -> None:
    """Line ends, and marks that turn the text around."""
    task = Task.from_prompts(gpt2(), ["Then\n\u202e Tom"], ["Then\n\u202e Paul"], [" to"], [" at"])
    html = task._repr_html_()
    assert ">Ċ</td>" in html and "\n" not in html and "\u202e" not in html


# -- rows of different lengths ---------------------------------------------------------------------


def test_a_model_may_be_given_the_prompts_as_they_are(tiny: Any) -> None:
    """Filled rows change nothing before their end, and no metric reads behind it."""
    task = ioi(tiny.tokenizer, pairs=6, mixed_lengths=True)
    assert len(task.lengths.unique()) > 1 and int(task.clean.min()) >= 0
    with torch.no_grad():
        logits, cache = tiny.run_with_cache(task.clean)
        alone = [tiny(row[None, :n])[0] for row, n in zip(task.clean, task.lengths, strict=True)]
    for row, one, n in zip(logits, alone, task.lengths.tolist(), strict=True):
        torch.testing.assert_close(row[:n], one, rtol=1e-3, atol=1e-4)
    ends = torch.stack([one[-1] for one in alone])
    wanted = ends[range(6), task.answers] - ends[range(6), task.foils]
    torch.testing.assert_close(task.metric(logits), wanted, rtol=1e-3, atol=1e-4)
    text, n = tiny.to_string(task.clean[0]), int(task.lengths[0])
    assert text.startswith(tiny.to_string(task.clean[0, :n])) and cache["embed.hook_out"].dim() == 3


def test_shorter_rows_end_in_the_tokenizers_end_of_text() -> None:
    tokenizer = gpt2()
    shorter = Task.from_prompts(tokenizer, *LISTS)
    assert set(shorter.clean[1, int(shorter.lengths[1]) :].tolist()) == {tokenizer.eos_token_id}
    assert mixed().clean[0].tolist() == [10, 0, 0, 0]  # without one: a token of every model
    given = Task.from_tokens([[5, 6], [7]], [[5, 7], [6]], [1, 2], [3, 3], tokenizer=tokenizer)
    assert given.clean.tolist() == [[5, 6], [7, tokenizer.eos_token_id]]


@pytest.mark.usefixtures("annotations_unchecked")
def test_lengths_are_kept_and_checked() -> None:
    task = mixed()
    again = replace(task, name="again")
    assert torch.equal(again.lengths, task.lengths) and torch.equal(again.clean, task.clean)
    direct = Task(task.clean, task.corrupt, task.answers, task.foils, lengths=task.lengths)
    assert direct.lengths.tolist() == [2, 4, 3, 4, 2, 4]
    whole = Task(task.clean, task.corrupt, task.answers, task.foils)
    assert whole.lengths.tolist() == [4] * 6  # nothing says where rows end
    for lengths in ([2, 4, 3, 4, 2, 5], [2, 4, 3, 4, 2, 0], [2]):
        assert full_message(lambda n=lengths: replace(task, lengths=torch.tensor(n))) == (
            "`lengths` must hold a number of tokens from 1 to 4 per pair, shape [6]; got "
            f"{lengths}; or leave it out"
        )


def test_a_token_for_padding_alone_is_in_no_prompt() -> None:
    """It may have no embedding: `must_fit` is about what models are given."""
    tokenizer = copy.deepcopy(gpt2())
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    task = Task.from_prompts(tokenizer, *LISTS)
    assert tokenizer.pad_token_id not in task.clean

    class Cfg:
        d_vocab, n_ctx = 12, 4

    high = mixed(tokenizer=None)
    vars(high)["clean"] = high.clean.masked_fill(high.clean == 0, 0)
    assert "d_vocab 12; got 15" in full_message(lambda: high.must_fit(Cfg, "m"))


# -- chat ------------------------------------------------------------------------------------------


def test_a_chat_wraps_each_prompt_once() -> None:
    tokenizer = talking()
    spans = {"IO": ["Mary", "Tom"], "S2": [", John", "smiled"]}
    task = Task.from_prompts(tokenizer, *LISTS, chat=True, spans=spans)
    for i, text in enumerate(CLEAN):
        row = task.clean[i, : int(task.lengths[i])].tolist()
        wanted = f"user: {text}\nassistant:"
        assert row.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(row[1:]) == wanted
        assert task[i].clean == wanted and task[i].answers == (LISTS[2][i],)
        for name, texts in spans.items():
            at = int(task.spans[name][i])
            assert tokenizer.decode(row[1 : at + 1]) == (
                "user: " + text[: text.index(texts[i]) + len(texts[i])]
            )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": CLEAN[1]}], add_generation_prompt=True, return_dict=False
    )
    assert task.clean[1, : int(task.lengths[1])].tolist() == ids


def test_a_template_may_cut_the_ends_of_a_prompt() -> None:
    tokenizer = talking()
    task = Task.from_prompts(
        tokenizer, ["  Then Tom went \n"], ["  Then Paul went \n"], [" to"], [" at"], chat=True,
        spans={"who": " Tom"},
    )  # fmt: skip
    assert task[0].spans["who"] == (" Tom", int(task.spans["who"]))
    assert task[0].clean == "user: Then Tom went\nassistant:"
    with pytest.raises(ValueError, match="span 'end' of pair 0 must stand in the chat"):
        Task.from_prompts(
            tokenizer, ["Then Tom went "], ["Then Paul went "], [" to"], [" at"], chat=True,
            spans={"end": "went "},
        )  # fmt: skip


def test_a_first_token_that_opens_each_turn_is_part_of_the_text() -> None:
    tokenizer = talking("{{ bos_token }}user {{ messages[0]['content'] }}{{ bos_token }}model")
    task = Task.from_prompts(tokenizer, *LISTS, chat=True)
    bos = tokenizer.bos_token
    assert [p.clean for p in task] == [f"{bos}user {text}{bos}model" for text in CLEAN]
    sides = [[getattr(p, name) for p in task] for name in ("clean", "corrupt")]
    assert torch.equal(Task.from_prompts(tokenizer, *sides, *LISTS[2:]).clean, task.clean)


def test_chats_that_are_refused() -> None:
    silent = copy.deepcopy(gpt2())
    assert full_message(lambda: Task.from_prompts(silent, *LISTS, chat=True)) == (
        "`chat` must get a tokenizer with a chat template; 'TokenizersBackend' has none; leave "
        "`chat` out, or set tokenizer.chat_template"
    )
    silent.name_or_path = "folder/model"
    assert "'folder/model' has none" in full_message(
        lambda: Task.from_prompts(silent, *LISTS, chat=True)
    )
    loud = talking(template="{{ messages[0]['content'] | replace('Tom', 'John') }}:")
    assert "pair 1 has 'Then John smiled at:' for 'Then Tom smiled at'" in full_message(
        lambda: Task.from_prompts(loud, *LISTS, chat=True, spans={"x": ["Mary", "Tom"]})
    )
    assert len(Task.from_prompts(loud, *LISTS, chat=True, spans={"x": [1, 1]})) == 2


# -- errors ----------------------------------------------------------------------------------------


def test_long_prompts_are_shown_around_where_they_part() -> None:
    middle = "Then Tom and John went to the store and "
    call = lambda: Task.from_prompts(  # noqa: E731
        gpt2(), [middle * 3 + "Mary smiled at"], [middle + "then " + middle * 2 + "Mary smiled at"],
        [" Tom"], [" John"],
    )  # fmt: skip
    first, clean, corrupt = full_message(call).splitlines()
    assert first.startswith("`corrupt` must tokenize to the length of `clean`: pair 0 has ")
    assert clean.startswith("  clean  |…|") and corrupt.startswith("  corrupt|…|")
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in (clean, corrupt)]
    assert bars[0] == bars[1] and clean.endswith("|…|") and len(clean) < 120


def test_empty_prompts_are_refused() -> None:
    lists = ["Then Tom", ""], ["Then Paul", ""], [" a"] * 2, [" b"] * 2
    assert full_message(lambda: Task.from_prompts(gpt2(), *lists, prepend_bos=False)) == (
        "prompts must have at least one token; pair 1 has 0 and 0; give both texts, or leave that "
        "pair out"
    )


def test_an_answer_that_is_its_own_foil_is_read_out() -> None:
    assert full_message(
        lambda: Task.from_prompts(gpt2(), *LISTS[:3], [" John", " Tom"])
    ).startswith(
        "an answer must differ from its foil, or their difference is always 0: pair 1 has token "
    )
    message = full_message(lambda: Task.from_prompts(gpt2(), *LISTS[:3], [" John", " Tom"]))
    assert "(' Tom') for both" in message
    assert full_message(lambda: Task.from_prompts(gpt2(), *LISTS[:3], [[" John"], []])) == (
        "`foils` must hold at least one text per pair; pair 1 has none; give it one, or leave that "
        "pair out"
    )
