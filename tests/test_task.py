"""Tasks and metrics: alignment, positions and read-outs, worked out by hand."""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ragged_task, random_task, without_a_difference
from test_ioi import gpt2, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from circuits import patch
from relp import DEEPLIFT, GRADIENT, RELP, attribute
from tasks import KLDivergence, Task, ioi, logit_difference, probability_difference
from tasks.metrics import Metric, takes_task

CLEAN = ["When Mary and John went to the store, John gave a drink to", "Then Tom smiled at"]
CORRUPT = ["When Mary and John went to the store, Mary gave a drink to", "Then Paul smiled at"]
ANSWERS = [" Mary", " Tom"]
FOILS = [" John", " Paul"]


@pytest.fixture(scope="module", params=[gpt2, llama], ids=["byte-level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run it: without the tests' type checker, which refuses wrong shapes first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def two() -> Task:
    """Two pairs of three tokens over a vocabulary of four; answers 1 and 2, foil 0."""
    return Task.from_tokens(
        torch.tensor([[3, 1, 1], [3, 2, 2]]), torch.tensor([[3, 0, 1], [3, 0, 2]]), [1, 2], [0, 0]
    )


def mixed(**options: Any) -> Task:
    """Pair i has length 2, 4, 3, 4, 2, 4 and starts with token 10 + i."""
    rows = [torch.tensor([10 + i, *range(n - 1)]) for i, n in enumerate((2, 4, 3, 4, 2, 4))]
    return Task.from_tokens(
        rows, [r.flip(0) for r in rows], list(range(6)), list(range(6, 12)), **options
    )


def logits_at(values: list[list[float]], length: int = 3, position: int = -1) -> Tensor:
    """Logits that hold `values` at one position and 99 everywhere else."""
    logits = torch.full((len(values), length, len(values[0])), 99.0)
    logits[:, position] = torch.tensor(values)
    return logits


def full_message(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    return str(error.value)


# -- building --------------------------------------------------------------------------------------


def test_from_tokens_keeps_ids_and_reads_at_the_end() -> None:
    task = two()
    assert len(task) == 2 and task.lengths.tolist() == [3, 3]
    assert task.clean.tolist() == [[3, 1, 1], [3, 2, 2]]
    assert task.corrupt.tolist() == [[3, 0, 1], [3, 0, 2]]
    assert task.answers.tolist() == [1, 2] and task.foils.tolist() == [0, 0]
    assert list(task.spans) == ["end"] and task.spans["end"].tolist() == [2, 2]
    assert repr(task) == "Task('task', 2 pairs, 3 tokens, metric=logit_difference, spans=['end'])"
    assert repr(mixed(name="mix")).startswith("Task('mix', 6 pairs, 2-4 tokens, ")


def test_from_prompts_aligns_tokens_and_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    task = Task.from_prompts(tokenizer, CLEAN, CORRUPT, ANSWERS, FOILS, name="names")
    bos = tokenizer.bos_token_id
    for i, (clean, corrupt) in enumerate(zip(CLEAN, CORRUPT, strict=True)):
        end = int(task.spans["end"][i])
        for row, text in ((task.clean[i], clean), (task.corrupt[i], corrupt)):
            ids = row[: end + 1].tolist()
            assert ids[0] == bos and ids.count(bos) == 1
            assert tokenizer.decode(ids[1:]) == text
            assert row[end + 1 :].tolist() == [tokenizer.eos_token_id or bos] * (len(row) - end - 1)
        # what the model should say is exactly what the tokenizer makes of the longer text
        for side, word in ((task.answers, ANSWERS[i]), (task.foils, FOILS[i])):
            whole = tokenizer(clean + word, add_special_tokens=False).input_ids
            assert [bos, *whole] == [*task.clean[i, : end + 1].tolist(), int(side[i])]
    assert task.name == "names" and (task.lengths == task.spans["end"] + 1).all()
    assert task.lengths[0] > task.lengths[1]


def test_beginning_of_sequence_is_never_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    bos = tokenizer.bos_token
    made = [
        Task.from_prompts(tokenizer, [p + CLEAN[1]], [p + CORRUPT[1]], [" Tom"], [" Paul"])
        for p in ("", bos)
    ]
    assert torch.equal(made[0].clean, made[1].clean)
    bare = Task.from_prompts(
        tokenizer, CLEAN[1:], CORRUPT[1:], [" Tom"], [" Paul"], prepend_bos=False
    )
    assert torch.equal(bare.clean, made[0].clean[:, 1:])


def test_a_tokenizer_without_such_a_token_gets_none() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2().backend_tokenizer)
    assert tokenizer.bos_token_id is None
    task, bare = (
        Task.from_prompts(tokenizer, CLEAN, CORRUPT, ANSWERS, FOILS, prepend_bos=b)
        for b in (True, False)
    )
    assert torch.equal(task.clean, bare.clean)


def test_a_task_is_frozen() -> None:
    task = two()
    with pytest.raises(FrozenInstanceError):
        task.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        task.spans["end"] = torch.tensor([0, 0])  # type: ignore[index]


# -- lengths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 100])
def test_buckets_partition_the_pairs_without_padding(batch_size: int | None) -> None:
    task = mixed(spans={"first": [0] * 6})
    seen: list[int] = []
    for index, bucket in task.buckets(batch_size):
        assert len(index) == len(bucket) <= (batch_size or 6)
        assert int(bucket.clean.min()) >= 0 and int(bucket.corrupt.min()) >= 0
        assert len(set(bucket.lengths.tolist())) == 1 and bucket.clean.shape[1] == bucket.lengths[0]
        assert bucket.clean[:, 0].tolist() == [10 + i for i in index.tolist()]
        assert bucket.answers.tolist() == index.tolist()
        assert bucket.foils.tolist() == [6 + i for i in index.tolist()]
        assert (bucket.spans["end"] == bucket.lengths - 1).all()
        assert torch.equal(bucket.spans["first"], torch.zeros(len(index), dtype=torch.long))
        seen += index.tolist()
    assert sorted(seen) == list(range(6))
    assert task.clean[0].tolist() == [10, 0, 0, 0] and task.lengths[0] == 2


def test_buckets_are_as_few_as_lengths_and_batches_allow() -> None:
    assert [i.tolist() for i, _ in mixed().buckets()] == [[0, 4], [2], [1, 3, 5]]
    assert [i.tolist() for i, _ in mixed().buckets(2)] == [[0, 4], [2], [1, 3], [5]]
    task = two()
    ((_, only),) = task.buckets()
    assert only is task


def test_batch_size_must_be_positive() -> None:
    assert full_message(lambda: next(two().buckets(0))) == (
        "`batch_size` must be at least 1; got 0; or leave it out"
    )


# -- choosing --------------------------------------------------------------------------------------


def test_select_takes_rows_in_the_order_asked_for_and_trims() -> None:
    ends = [0, 2, 1, 3, 1, 0]
    task = mixed(name="mix", metric="probability_difference", spans={"end": ends})
    part = task.select([2, 0, 2])
    assert part.clean.tolist() == [[12, 0, 1], [10, 0, 0], [12, 0, 1]]
    assert part.corrupt.tolist() == [[1, 0, 12], [0, 10, 0], [1, 0, 12]]
    assert part.answers.tolist() == [2, 0, 2] and part.foils.tolist() == [8, 6, 8]
    assert part.spans["end"].tolist() == [1, 0, 1]
    assert part.name == "mix" and part.metric.function is probability_difference


def test_select_takes_a_mask() -> None:
    mask = torch.tensor([False, True, False, False, True, False])
    assert mixed().select(mask).answers.tolist() == [1, 4]
    assert mixed().select(mask.tolist()).answers.tolist() == [1, 4]


@pytest.mark.parametrize("nothing", [[], torch.zeros(6, dtype=torch.bool)])
def test_selecting_nothing_is_an_error(nothing: Any) -> None:
    assert full_message(lambda: mixed().select(nothing)) == (
        "a selection must keep at least one pair; got none of the 6 pairs of task 'task'; "
        "choose some by number, counted from 0, or by a mask"
    )


def test_with_metric_changes_the_read_out_only() -> None:
    task = mixed(spans={"first": [0] * 6})
    other = task.with_metric("probability_difference")
    assert other.metric.name == "probability_difference"
    assert task.metric.name == "logit_difference"
    for field in ("clean", "corrupt", "answers", "foils"):
        assert torch.equal(getattr(other, field), getattr(task, field))
    assert torch.equal(other.spans["first"], task.spans["first"])


def test_filter_correct_asks_the_model_about_each_length() -> None:
    """Right on pairs 1, 4 and 5; a tie on pair 2 is not right."""
    right = {1, 4, 5}
    shapes = []

    def model(tokens: Tensor) -> Tensor:
        assert int(tokens.min()) >= 0 and not torch.is_grad_enabled()
        shapes.append(tuple(tokens.shape))
        logits = torch.zeros(*tokens.shape, 12)
        for row, first in enumerate(tokens[:, 0].tolist()):
            i = first - 10
            logits[row, :-1, 6 + i] = 100.0  # only the last position counts
            logits[row, -1, i] = {True: 1.0, False: -1.0}[i in right] if i != 2 else 0.0
        return logits

    kept = mixed().filter_correct(model)
    assert kept.answers.tolist() == [1, 4, 5] and kept.lengths.tolist() == [4, 2, 4]
    assert shapes == [(2, 2), (1, 3), (3, 4)]


def test_filter_correct_needs_one_right_answer() -> None:
    task = mixed(name="mix")
    assert full_message(lambda: task.filter_correct(lambda t: torch.zeros(*t.shape, 12))) == (
        "at least one pair must be answered correctly; the model prefers the foil on all 6 pairs "
        "of task 'mix'; use a model that can do the task"
    )


class Echo(nn.Module):
    """Logits that a model in train mode would draw anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.drop(nn.functional.one_hot(tokens, 16).float())


@pytest.mark.parametrize("call", [KLDivergence.of, lambda m, task: task.filter_correct(m)])
def test_models_in_train_mode_are_refused(call: Callable[[Any, Task], object]) -> None:
    model, task = Echo(), mixed()
    message = "the model must be in eval mode, or dropout makes every number noise; {} is in train "
    assert full_message(lambda: call(model, task)).startswith(message.format("'the model'"))
    model.eval().drop.train()
    assert full_message(lambda: call(model, task)).startswith(message.format("'drop'"))
    call(model.eval(), task.select([0]))


# -- errors of building ----------------------------------------------------------------------------


def test_prompts_must_align_token_by_token() -> None:
    longer = ["When Mary and John went to the store, Mary gave a big drink to", CORRUPT[1]]
    bpe = gpt2()
    n, m = (len(bpe(t, add_special_tokens=False).input_ids) + 1 for t in (CLEAN[0], longer[0]))
    assert m > n
    assert full_message(lambda: Task.from_prompts(bpe, CLEAN, longer, ANSWERS, FOILS)) == (
        f"`corrupt` must tokenize to the length of `clean`: pair 0 has {n} and {m} tokens; "
        "choose words of as many tokens:\n"
        "  clean  |…|,|ĠJohn|Ġgave|Ġa|  | | |Ġdrink|Ġto|\n"
        "  corrupt|…|,|ĠMary|Ġgave|Ġa|Ġb|i|g|Ġdrink|Ġto|"
    )


def test_an_answer_must_be_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    message = full_message(
        lambda: Task.from_prompts(tokenizer, CLEAN, CORRUPT, [" Mary", " Tom Paul"], FOILS)
    )
    space = "Ġ" if "Ġ" in message else "▁"
    assert message == (
        "`answers` of pair 1: an answer must be exactly one token after its prompt; ' Tom Paul' "
        f"after 'Then Tom smiled at' is ['{space}Tom', '{space}Paul']; choose a word of one token, "
        'with its leading space, or read all of it with continuation="sum"'
    )
    # nothing at all; a prompt that has the answer's space
    for prompt, answer, do in (
        ("Then Tom smiled at", "", "begin the answer where a token begins, with its leading space"),
        ("Then Tom smiled at ", "Tom", "its last space, and begin the answer with one"),
    ):
        other = prompt.replace("Tom", "Paul")
        message = full_message(
            lambda given=(tokenizer, [prompt], [other], [answer], [" Paul"]): Task.from_prompts(
                *given
            )
        )
        assert message.startswith(
            "`answers` of pair 0: an answer must add tokens to its prompt and leave the prompt's "
            f"own as they are; {prompt!r} and {answer!r} together end in ["
        )
        assert message.endswith(do)


def test_answers_that_go_on_with_a_word_are_warned_of() -> None:
    """A letter is a token of its own in a byte-level tokenizer: nothing else would tell."""
    prompts = ["Then Mary met"], ["Then John met"]
    with pytest.warns(UserWarning) as found:
        Task.from_prompts(gpt2(), *prompts, ["X"], [" John"])
    assert [str(one.message) for one in found] == [
        "`answers` of pair 0 must begin where a word begins; 'X' goes on with the last word of "
        "'Then Mary met'; give it its leading space (' X'), or ignore this if one word is meant"
    ]
    prompts = ["From 1743 to 17"], ["From 1701 to 17"]
    Task.from_prompts(gpt2(), *prompts, ["8"], ["0"])  # no word


def test_an_answer_must_leave_its_prompt_as_it_was() -> None:
    """`ab` is a, b, and with `cd` behind it a, bc, d: one more, but not after the prompt."""
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "d", "bc"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    with pytest.warns(UserWarning, match="'[da]' goes on with the last word of 'ab'; give it"):
        made = Task.from_prompts(tokenizer, ["ab"], ["bb"], ["d"], ["a"])
    assert made.answers.tolist() == [3] and made.foils.tolist() == [0]
    assert full_message(lambda: Task.from_prompts(tokenizer, ["ab"], ["bb"], ["cd"], ["a"])) == (
        "`answers` of pair 0: an answer must add tokens to its prompt and leave the prompt's own "
        "as they are; 'ab' and 'cd' together end in ['a', 'bc', 'd']; begin the answer where a "
        "token begins, with its leading space (' cd')"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"foils": [" John"]},
            "`foils` must be a list of 2 texts, one per pair; got 1; "
            "give clean, corrupt, answers and foils lists of one length",
        ),
        (
            {"corrupt": "Then Paul smiled at"},
            "`corrupt` must be a list of 2 texts, one per pair; got 'Then Paul smiled at'; "
            "give clean, corrupt, answers and foils lists of one length",
        ),
        (
            {"clean": [], "corrupt": [], "answers": [], "foils": []},
            "`clean` must be a list of one or more texts, one per pair; got 0; "
            "give clean, corrupt, answers and foils lists of one length",
        ),
        (
            {"clean": "Then Tom smiled at"},
            "`clean` must be a list of one or more texts, one per pair; got 'Then Tom smiled at'; "
            "give clean, corrupt, answers and foils lists of one length",
        ),
    ],
    ids=["too few", "a text", "none", "clean a text"],
)
def test_lists_of_texts_must_correspond(change: dict[str, Any], message: str) -> None:
    texts = {"clean": CLEAN, "corrupt": CORRUPT, "answers": ANSWERS, "foils": FOILS} | change
    assert full_message(lambda: Task.from_prompts(gpt2(), **texts)) == message


def rows(*lengths: int) -> list[Tensor]:
    return [torch.arange(n) for n in lengths]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (rows(2, 2), rows(2), [0, 0], [1, 1]),
            "`clean` and `corrupt` must hold as many prompts; got 2 and 1; "
            "every clean prompt needs its corrupt partner",
        ),
        (
            (rows(2, 3), rows(2, 4), [0, 0], [1, 1]),
            "`corrupt` must have the length of `clean`: pair 1 has 3 and 4 tokens; "
            "choose prompts that align token by token",
        ),
        (
            ([torch.tensor([5, -1])], [torch.tensor([6, -1])], [0], [1]),
            "token ids must be non-negative and a prompt non-empty: pair 0 is [5, -1] / [6, -1]; "
            "pass the tokenizer's ids without padding",
        ),
        (
            (rows(2, 0), rows(2, 0), [0, 0], [1, 1]),
            "token ids must be non-negative and a prompt non-empty: pair 1 is [] / []; "
            "pass the tokenizer's ids without padding",
        ),
        (
            (rows(2, 2), rows(2, 2), [0], [1, 1]),
            "`answers` must hold one token id per pair, shape [2], or a set of them, [2, set]; got "
            "[1]; give one answer token, or one list of several, for every prompt",
        ),
        (
            (rows(2, 2), rows(2, 2), [0, 0], [[1, 1]]),
            "`foils` must hold one token id per pair, shape [2], or a set of them, [2, set]; got "
            "[1, 2]; give one answer token, or one list of several, for every prompt",
        ),
        (
            (rows(2, 2), rows(2, 2), [0, -1], [1, 1]),
            "`answers` must hold token ids, 0 or more; pair 1 has -1; "
            "use the ids that the tokenizer gives",
        ),
        (
            ([], [], [], []),
            "`clean` and `corrupt` must be token ids [pair, pos] of one shape with at least one "
            "pair; got [0, 0] and [0, 0]; use Task.from_prompts or Task.from_tokens to build them",
        ),
    ],
    ids=["partners", "lengths", "padding", "empty", "answers", "foils", "negative", "none"],
)
def test_tokens_must_correspond(arguments: tuple[Any, ...], message: str) -> None:
    assert full_message(lambda: Task.from_tokens(*arguments)) == message


@pytest.mark.usefixtures("unchecked")
def test_the_constructor_checks_shapes_and_padding() -> None:
    task = two()
    assert full_message(lambda: replace(task, corrupt=task.corrupt[:, :2])) == (
        "`clean` and `corrupt` must be token ids [pair, pos] of one shape with at least one pair; "
        "got [2, 3] and [2, 2]; use Task.from_prompts or Task.from_tokens to build them"
    )
    shorter = torch.tensor([[3, 0, 1], [3, 0, -1]])
    assert full_message(lambda: replace(task, corrupt=shorter)) == (
        "`corrupt` must have the length of `clean`: pair 1 has 3 and 2 tokens; "
        "choose prompts that align token by token"
    )
    outside = torch.tensor([[3, 0, 1], [3, -7, 2]])
    assert full_message(lambda: replace(task, corrupt=outside)) == (
        "token ids must be non-negative, and -1 only after a prompt's end: pair 1 is "
        "[3, 2, 2] / [3, -7, 2]; use Task.from_tokens for prompts of different lengths"
    )
    for bad in (torch.tensor([[3, -1, 1], [3, 2, 2]]), torch.tensor([[3, 1, 1], [3, -7, 2]])):
        i = int((bad < 0).any(1).nonzero()[0])
        with pytest.raises(ValueError) as error:
            replace(task, clean=bad, corrupt=bad)
        assert str(error.value) == (
            f"token ids must be non-negative, and -1 only after a prompt's end: pair {i} is "
            f"{bad[i].tolist()} / {bad[i].tolist()}; use Task.from_tokens for prompts of "
            "different lengths"
        )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("at", "shown"), [([0, 3], "[0, 3]"), ([-1, 0], "[-1, 0]"), ([0], "[0]")], ids=str
)
def test_spans_lie_inside_their_prompts(at: list[int], shown: str) -> None:
    task = two()
    message = full_message(
        lambda: Task.from_tokens(
            task.clean, task.corrupt, task.answers, task.foils, spans={"S1": at}
        )
    )
    assert message == (
        "span 'S1' must hold one position inside the prompt per pair, shape [2]; "
        f"got {shown} for lengths [3, 3]; "
        "count positions from 0, the beginning-of-sequence token included"
    )


def test_an_answer_that_is_its_own_foil_measures_nothing() -> None:
    task = mixed()
    foils = task.foils.clone()
    foils[3] = task.answers[3]
    for metric in ("logit_difference", "probability_difference"):
        assert full_message(lambda m=metric: replace(task, foils=foils, metric=m)) == (
            "an answer must differ from its foil, or their difference is always 0: pair 3 has "
            "token 3 for both; choose another foil, or give a metric that reads none"
        )
    for metric in (lambda logits: logits[:, -1, 0], KLDivergence(torch.zeros(6, 4))):
        assert len(replace(task, foils=foils, metric=metric)) == 6


def test_a_metric_is_a_known_name_or_a_callable() -> None:
    assert full_message(lambda: two().with_metric("accuracy")) == (
        "`metric` must be one of ['logit_difference', 'mean_logit_difference', "
        "'probability_difference'] or a callable; got 'accuracy'; pass a function logits -> [pair]"
    )
    assert full_message(lambda: replace(two(), metric=3), TypeError) == (
        "`metric` must be one of ['logit_difference', 'mean_logit_difference', "
        "'probability_difference'] or a callable; got int; pass a function logits -> [pair]"
    )


# -- metrics ---------------------------------------------------------------------------------------

VALUES = [[1.0, 3.0, 0.0, 0.0], [2.0, 0.0, 1.5, 0.0]]


def test_logit_difference_by_hand() -> None:
    task = two()
    assert task.metric(logits_at(VALUES)).tolist() == [2.0, -0.5]
    assert logit_difference(logits_at(VALUES), task).tolist() == [2.0, -0.5]


def test_probability_difference_by_hand() -> None:
    """Logits are logarithms of weights 1 2 4 1 and 5 1 3 1: (2-1)/8 and (3-5)/10."""
    logits = logits_at([[1.0, 2.0, 4.0, 1.0], [5.0, 1.0, 3.0, 1.0]]).log()
    got = two().with_metric("probability_difference").metric(logits)
    torch.testing.assert_close(got, torch.tensor([1 / 8, -2 / 10]))
    assert torch.equal(got, probability_difference(logits, two()))


def test_kl_divergence_by_hand() -> None:
    """Clean (½, ½) and (¼, ¾), run (¼, ¾) and (¼, ¾): -½ ln(2 · ⅔) = -½ ln(4/3), and 0."""
    reference = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    task = two()
    task = task.with_metric(KLDivergence(reference.log()))
    logits = logits_at([[1.0, 3.0], [2.0, 6.0]]).log()
    want = torch.tensor([-0.5 * torch.log(torch.tensor(4 / 3)), 0.0])
    torch.testing.assert_close(task.metric(logits), want)
    assert task.metric.name == "KLDivergence"


def test_kl_divergence_of_a_model_is_zero_on_its_clean_run_for_each_length() -> None:
    def model(tokens: Tensor) -> Tensor:
        assert int(tokens.min()) >= 0
        return torch.nn.functional.one_hot(tokens.cumsum(1) % 7, 7).float() * 2.0

    task = mixed()
    metric = KLDivergence.of(model, task)
    assert metric.reference.shape == (6, 7) and not metric.reference.requires_grad
    torch.testing.assert_close(metric.reference.exp().sum(1), torch.ones(6))
    task = task.with_metric(metric)
    for index, bucket in task.buckets(2):
        assert torch.equal(bucket.metric.function.reference, metric.reference[index])
        torch.testing.assert_close(bucket.metric(model(bucket.clean)), torch.zeros(len(index)))
        shifted = model(bucket.clean).roll(1, -1)
        assert bool((bucket.metric(shifted) < -0.1).all())


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
def test_a_divergence_says_nothing_at_the_clean_run(tiny: Any) -> None:
    """It is 0 there and nowhere above: gradients are 0, what two runs tell is not."""
    task = random_task(tiny, pairs=2, length=3)
    task = task.with_metric(KLDivergence.of(tiny, task))
    for rules in (GRADIENT, RELP, DEEPLIFT.with_(softmax="derivative")):
        message = full_message(lambda r=rules: attribute(tiny, task, rules=r, direction="noise"))
        assert message == (
            "with direction='noise' the metric must have a slope on the clean run; 'KLDivergence' "
            f"is 0 there, its maximum, and so would be every score under {rules.name}; use "
            "direction='denoise', steps=5, rules=DEEPLIFT, or patch, which measures"
        )
    for options in ({"rules": DEEPLIFT}, {"steps": 2}, {"steps": 2, "path": "activations"}):
        scores = attribute(tiny, task, direction="noise", **options)
        assert scores.nodes is not None and float(scores.nodes.abs().max()) > 1e-2
    effect = patch(tiny, task, components=["embed"], direction="noise", positions=False)
    assert effect.nodes is not None and float(effect.nodes.max()) < -1e-2
    same = without_a_difference(task)  # 0 is true there
    assert attribute(tiny, same, direction="denoise").nodes.abs().max() < 1e-6
    vocabulary = int(tiny.cfg.d_vocab)
    elsewhere = KLDivergence(torch.eye(2, vocabulary).log_softmax(-1))  # not this model's own
    scores = attribute(tiny, task.with_metric(elsewhere), direction="noise")
    assert scores.nodes is not None and float(scores.nodes.abs().max()) > 1e-3


def test_the_answer_is_read_where_the_task_says() -> None:
    task = replace(two(), spans={"end": torch.tensor([0, 1])})
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 1], logits[1, 1, 2], logits[:, 2] = 5.0, 7.0, -1.0
    assert task.metric(logits).tolist() == [5.0, 7.0]


@pytest.mark.parametrize("metric", ["logit_difference", "probability_difference", "KL"])
def test_one_position_of_logits_is_the_answers(metric: str) -> None:
    divergence = KLDivergence(torch.eye(4)[:2].log_softmax(-1))
    task = two().with_metric(divergence if metric == "KL" else metric)
    logits = logits_at(VALUES)
    assert torch.equal(task.metric(logits), task.metric(logits[:, -1:]))
    assert task.metric.reads_answer_only


def test_a_metric_may_take_logits_or_logits_and_task() -> None:
    task = two()

    def alone(logits: Tensor) -> Tensor:
        return logits[:, -1, 1]

    def scaled(logits: Tensor, scale: float = 2.0) -> Tensor:
        return logits[:, -1, 1] * scale

    def both(logits: Tensor, given: Task) -> Tensor:
        return logits[torch.arange(len(given)), -1, given.answers]

    def named(logits: Tensor, *, task: Task) -> Tensor:
        return both(logits, task)

    logits = logits_at(VALUES)
    for function, want in (
        (alone, [3.0, 0.0]),
        (scaled, [6.0, 0.0]),
        (both, [3.0, 1.5]),
        (named, [3.0, 1.5]),
        (lambda logits, task=None: both(logits, task), [3.0, 1.5]),
    ):
        bound = task.with_metric(function).metric
        assert bound(logits).tolist() == want
        assert bound.name == function.__name__ and not bound.reads_answer_only
        assert takes_task(function) == (want == [3.0, 1.5])


def test_a_metric_sees_the_task_of_its_own_rows() -> None:
    def metric(logits: Tensor, task: Task) -> Tensor:
        return task.answers.float()

    task = mixed(metric=metric)
    assert task.metric.task is task
    for index, bucket in task.buckets(2):
        assert bucket.metric.task is bucket
        assert bucket.metric(torch.zeros(len(index), 1, 12)).tolist() == index.tolist()
    renamed = replace(task, name="other", answers=task.answers + 1)
    assert renamed.metric.task is renamed and isinstance(renamed.metric, Metric)
    assert renamed.metric(torch.zeros(6, 1, 12)).tolist() == [1, 2, 3, 4, 5, 6]


def test_a_divergence_keeps_numbers_of_its_own() -> None:
    given = torch.zeros(2, 4, requires_grad=True)
    metric = KLDivergence(given)
    with torch.no_grad():
        given += 7
    assert not metric.reference.requires_grad and not bool(metric.reference.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_divergence_is_computed_in_single_precision(dtype: torch.dtype) -> None:
    """Half precision would round logarithms of a few hundred words by more than many effects."""
    values = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    task = two()
    metric = KLDivergence.of(lambda tokens: values, task)
    assert metric.reference.dtype == torch.float32
    assert torch.equal(metric.reference, values[:, -1].float().log_softmax(-1))
    shifted = values.roll(1, -1)
    wanted = metric(shifted.float(), task)
    assert torch.equal(metric(shifted, task), wanted) and float(wanted.max()) < -0.1


def test_a_divergence_is_of_the_tasks_pairs() -> None:
    for pairs in (1, 3):
        task = two().with_metric(KLDivergence(torch.zeros(pairs, 4)))
        assert full_message(lambda task=task: task.metric(logits_at(VALUES))) == (
            f"KLDivergence must be made of the task it is used on; it holds {pairs} pairs and the "
            "task 2; use task.with_metric(KLDivergence.of(model, task))"
        )


def test_memory_that_runs_out_in_a_metric_is_no_fault_of_it() -> None:
    """Whoever runs the batch halves it then."""

    def metric(logits: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        two().with_metric(metric).metric(logits_at(VALUES))


def test_kl_divergence_follows_the_rows() -> None:
    reference = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    task = mixed(metric=KLDivergence(reference))
    twice = task.select([5, 1, 1]).select([2, 0])
    assert torch.equal(twice.metric.function.reference, reference[[1, 5]])
    assert torch.equal(task.metric.function.reference, reference)


@pytest.mark.parametrize(
    ("metric", "kind", "message"),
    [
        (
            lambda logits: logits[:, -1, 0].mean(),
            ValueError,
            "metric '<lambda>' must return shape [2], one number per pair; it returned [] for "
            "logits [2, 3, 4]; do not average over pairs, and take (logits, task) if it needs "
            "each pair's answers",
        ),
        (
            lambda logits: logits.argmax(-1)[:, -1],
            TypeError,
            "metric '<lambda>' must return a floating-point tensor, one number per pair; it "
            "returned torch.int64; return for instance logits[:, -1, answer] - "
            "logits[:, -1, foil]",
        ),
        (
            lambda logits: logits[:, -1, 0].tolist(),
            TypeError,
            "metric '<lambda>' must return a floating-point tensor, one number per pair; it "
            "returned list; return for instance logits[:, -1, answer] - logits[:, -1, foil]",
        ),
        (
            lambda logits: torch.tensor([1.0, float("nan")]),
            ValueError,
            "metric '<lambda>' must return finite numbers; pair 1 has nan; "
            "check the prompts of that pair and the metric's logarithms",
        ),
        (
            lambda logits: torch.tensor([float("-inf"), 0.0]),
            ValueError,
            "metric '<lambda>' must return finite numbers; pair 0 has -inf; "
            "check the prompts of that pair and the metric's logarithms",
        ),
    ],
    ids=["shape", "dtype", "list", "nan", "infinite"],
)
def test_what_a_metric_returns_is_checked(
    metric: Callable[..., Any], kind: type[Exception], message: str
) -> None:
    task = two().with_metric(metric)
    assert full_message(lambda: task.metric(logits_at(VALUES)), kind) == message


def test_logits_of_other_rows_are_refused() -> None:
    """Nothing is broadcast."""
    for shape in ([3, 3, 4], [1, 1, 4], [2, 4]):
        assert full_message(lambda shape=shape: two().metric(torch.zeros(shape))) == (
            f"logits must be [pair, pos, d_vocab] with 2 pairs; got {shape}; "
            "use the task that holds exactly those rows (task.select)"
        )


# -- what is given in other forms ------------------------------------------------------------------

TEXTS = {
    "clean": ["Then Tom smiled at", "Then Mary smiled at"],
    "corrupt": ["Then Paul smiled at", "Then John smiled at"],
    "answers": [" Tom", " Mary"],
    "foils": [" Paul", " John"],
}


class Column:
    """A lazy column that can be walked along, and does not know its length."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "array": np.array,
    "array of objects": lambda values: np.array(values, dtype=object),
    "rows kept by a filter": lambda values: pd.Series([values[0], *values]).iloc[1:],
    "categories": lambda values: pd.Series(values, dtype="category"),
    "generator": lambda values: (v for v in values),
    "lazy column": Column,
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_may_be_columns_arrays_or_generators(form: str) -> None:
    make = FORMS[form]
    task = Task.from_prompts(gpt2(), **TEXTS)
    given = Task.from_prompts(gpt2(), **{label: make(texts) for label, texts in TEXTS.items()})
    ids = [getattr(task, label).tolist() for label in TEXTS]
    rows = [make([tuple(row) for row in side]) for side in ids[:2]]
    spans = {"end": make([2, 1])}
    as_ids = Task.from_tokens(*rows, make(ids[2]), make(ids[3]), spans=spans)
    for other in (given, as_ids):
        for label in TEXTS:
            assert torch.equal(getattr(other, label), getattr(task, label))
    assert as_ids.spans["end"].tolist() == [2, 1]
    assert given.select(make([1, 0, 1])).answers.tolist() == [ids[2][i] for i in (1, 0, 1)]
    assert given.select(make([False, True])).answers.tolist() == ids[2][1:]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("label", "entry", "shown"),
    [
        ("clean", float("nan"), "nan, of type float"),
        ("corrupt", None, "None, of type NoneType"),
        ("answers", 3, "3, of type int"),
        ("foils", pd.NA, "<NA>, of type NAType"),
    ],
)
@pytest.mark.parametrize(
    "form", [list, lambda v: pd.Series(v, dtype=object)], ids=["list", "column"]
)
def test_an_entry_that_is_no_text_is_named(
    label: str, entry: Any, shown: str, form: Callable[[list[Any]], Any]
) -> None:
    changed = TEXTS | {label: form([TEXTS[label][0], entry])}
    assert full_message(lambda: Task.from_prompts(gpt2(), **changed), TypeError) == (
        f"`{label}` must hold texts only; pair 1 has {shown}; "
        "give it a text, or leave that pair out of all four lists"
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "NoneType"),
        (7, "int"),
        (b"Then", "bytes"),
        (set(TEXTS["corrupt"]), "set"),
        (dict(enumerate(TEXTS["corrupt"])), "dict"),
        (
            pd.DataFrame({"one": TEXTS["corrupt"], "two": TEXTS["corrupt"]}),
            "DataFrame of 2 dimensions",
        ),
        (np.array([TEXTS["corrupt"], TEXTS["corrupt"]]), "ndarray of 2 dimensions"),
    ],
)
def test_what_is_no_list_of_texts_is_named(value: Any, shown: str) -> None:
    assert full_message(lambda: Task.from_prompts(gpt2(), **(TEXTS | {"corrupt": value}))) == (
        f"`corrupt` must be a list of 2 texts, one per pair; got {shown}; "
        "give clean, corrupt, answers and foils lists of one length"
    )


@pytest.mark.usefixtures("unchecked")
def test_token_ids_and_positions_are_whole_numbers() -> None:
    given = {
        "clean": [[3, 1], [3, 2]],
        "corrupt": [[3, 0], [3, 0]],
        "answers": [1, 2],
        "foils": [0, 0],
    }
    tail = "; give integers, and lists of one length"
    for label, value, what, got in (
        ("clean", [[3, 1], [3.0, 2.5]], "row 1 of `clean`", "torch.float32"),
        ("corrupt", ["ab", "cd"], "row 0 of `corrupt`", "'ab'"),
        ("clean", [3, 1], "row 0 of `clean`", "3"),
        ("answers", [1, None], "`answers`", "[1, None]"),
        ("answers", [1, float("nan")], "`answers`", "torch.float32"),
        ("foils", torch.zeros(2, requires_grad=True), "`foils`", "torch.float32"),
        ("foils", [True, False], "`foils`", "torch.bool"),
        ("foils", [1j, 0], "`foils`", "torch.complex64"),
        ("foils", {0: 1, 1: 2}, "`foils`", "{0: 1, 1: 2}"),
        ("foils", [[1], [1, 0.5]], "pair 1 of `foils`", "torch.float32"),
        ("foils", [[1], "ab"], "pair 1 of `foils`", "['ab']"),
        ("spans", {"S1": [0.5, 1]}, "span 'S1'", "torch.float32"),
    ):
        made = given | {label: value}
        assert full_message(lambda made=made: Task.from_tokens(**made), TypeError) == (
            f"{what} must hold whole numbers; got {got}{tail}"
        )
    assert full_message(lambda: replace(two(), answers=torch.ones(2)), TypeError) == (
        "`answers` must hold whole numbers; got torch.float32" + tail
    )
    assert full_message(lambda: two().select([0.0, 1.0]), TypeError) == (
        "a selection must hold whole numbers; got torch.float32" + tail
    )
    assert full_message(
        lambda: Task.from_tokens("a text", **dict(list(given.items())[1:])), TypeError
    ) == (
        "`clean` must be a list of prompts as token ids; got str; use Task.from_prompts for texts"
    )
    for bad in (torch.zeros(2, 2, 2, dtype=torch.long), torch.tensor([3, 1])):
        shape = list(bad.shape[1:])
        row = list(bad)
        assert full_message(lambda row=row: Task.from_tokens(**(given | {"clean": row}))) == (
            f"row 0 of `clean` must be the token ids of one prompt; got shape {shape}; "
            "give one row per prompt"
        )
    small = Task.from_tokens(**{k: torch.tensor(v, dtype=torch.uint8) for k, v in given.items()})
    assert small.clean.dtype == small.answers.dtype == torch.long
    batches = [torch.tensor([row]) for row in given["clean"]]  # as tokenizers return tensors
    assert Task.from_tokens(**(given | {"clean": batches})).clean.tolist() == given["clean"]


def test_a_mask_is_of_this_task() -> None:
    for entries in (5, 7):
        assert full_message(lambda n=entries: mixed().select([True] * n)) == (
            f"a mask must have one entry per pair, shape [6]; got [{entries}]; "
            "make it from what this task's pairs gave"
        )


def test_what_the_caller_does_to_his_tensors_later_changes_nothing() -> None:
    sides = [
        torch.tensor(ids) for ids in ([[3, 1], [3, 2]], [[3, 0], [3, 0]], [1, 2], [0, 0], [1, 0])
    ]
    *ids, end = sides
    spans = {"end": end}
    made = [Task.from_tokens(*ids, spans=spans), Task(*ids, spans)]
    for tensor in sides:
        tensor += 7
    spans.clear()
    for task in made:
        assert [getattr(task, label).tolist() for label in TEXTS] == [
            [[3, 1], [3, 2]], [[3, 0], [3, 0]], [1, 2], [0, 0],
        ]  # fmt: skip
        assert task.spans["end"].tolist() == [1, 0]


@pytest.mark.parametrize("shipped", ["ioi-gpt2"], indirect=True)
def test_a_task_does_not_remember_in_which_mode_it_was_made(shipped: Any) -> None:
    with torch.inference_mode():
        tensors = torch.tensor([[5, 6, 7], [5, 8, 9]]), torch.tensor([[5, 6, 8], [5, 8, 7]])
        made = [
            ioi(shipped.tokenizer, pairs=2),
            Task.from_prompts(shipped.tokenizer, **TEXTS),
            Task.from_tokens(*tensors, [1, 2], [3, 4]),
            Task(*tensors, *torch.tensor([[1, 2], [3, 4]])),
        ]
        made += [task.with_metric(KLDivergence.of(shipped, task)) for task in made[:1]]
        made += [task.select([1]) for task in made] + [next(made[0].buckets(1))[1]]
    with torch.device("meta"):  # stands for any default device
        made.append(ioi(shipped.tokenizer, pairs=2))
    for task in made:
        for tensor in (*(getattr(task, label) for label in TEXTS), *task.spans.values()):
            assert not tensor.is_inference() and tensor.device.type == "cpu"
        reference = getattr(task.metric.function, "reference", None)
        assert reference is None or not reference.is_inference()
        scores = attribute(shipped, task)
        assert scores.nodes is not None and bool(scores.nodes.any())
    assert torch.equal(attribute(shipped, made[0]).nodes, attribute(shipped, made[-1]).nodes)


# -- words that are not known ----------------------------------------------------------------------

KNOWN = ["[UNK]", "[CLS]", "When", "Mary", "and", "John", "Tom", "went"]


def words(known: list[str] = KNOWN, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with one token for all that it does not know."""
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token=known[0]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.mark.parametrize(
    "special",
    [{"unk_token": "[UNK]"}, {"unk_token": "[UNK]", "bos_token": "[UNK]"}, {"bos_token": "[CLS]"}],
    ids=["named", "first token too", "not named"],
)
def test_unknown_words_are_refused(special: dict[str, str]) -> None:
    tokenizer = words(**special)
    first, second = ["When Mary and John went", "When Mary and Tom went"]
    good = {
        "clean": [first] * 2,
        "corrupt": [second] * 2,
        "answers": [" Mary"] * 2,
        "foils": [" John"] * 2,
    }
    assert Task.from_prompts(tokenizer, **good).answers.tolist() == [3, 3]
    for label, text, shown in (
        ("clean", "When Zebra and John went", "'Zebra' in 'When Zebra and John went'"),
        (
            "corrupt",
            "When Mary Zebra Giraffe went",
            "'Zebra', 'Giraffe' in '… Mary Zebra Giraffe went'",
        ),
        ("answers", " Zebra", "'Zebra' in '…Mary and John went Zebra'"),
        ("foils", " Zebra", "'Zebra' in '…Mary and John went Zebra'"),
    ):
        bad = good | {label: [good[label][0], text]}
        assert full_message(lambda bad=bad: Task.from_prompts(tokenizer, **bad)) == (
            f"pair 1 of `{label}` must be of words that the tokenizer knows; {shown} would be "
            "'[UNK]'; choose other words, or another tokenizer"
        )
    if special.get("unk_token"):  # who writes it means it, and only as often as it is written
        good["clean"][1], good["corrupt"][1] = first + " [UNK]", second + " [UNK]"
        assert Task.from_prompts(tokenizer, **good).clean[1].tolist().count(0) >= 1
        good["clean"][1], good["corrupt"][1] = first + " [UNK] Zebra", second + " [UNK] Tom"
        with pytest.raises(ValueError, match="pair 1 of `clean` must be of words .* 'Zebra' in"):
            Task.from_prompts(tokenizer, **good)


def test_byte_level_tokenizers_know_every_word() -> None:
    """Their unknown token is the one that starts a text, and may be written in one as well."""
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=gpt2().backend_tokenizer, bos_token=end, eos_token=end, unk_token=end
    )
    for start, count in (("", 1), (end, 1), (f"漢 {end}", 2)):
        task = Task.from_prompts(
            tokenizer, [f"{start}Then Tom met"], [f"{start}Then Paul met"], [" Tom"], [" Paul"]
        )
        assert task.clean[0].tolist().count(tokenizer.unk_token_id) == count


# -- pairs without a difference --------------------------------------------------------------------


def test_pairs_that_do_not_differ_are_refused() -> None:
    task = mixed()
    corrupt = task.corrupt.clone()
    corrupt[4] = task.clean[4]
    twice = TEXTS | {"corrupt": [TEXTS["corrupt"][0], TEXTS["clean"][1]]}
    said = (
        "`corrupt` must differ from `clean`, or nothing can be patched: pair {} has the same "
        "tokens on both sides; change in `corrupt` what the answer hangs on"
    )
    assert full_message(lambda: Task.from_prompts(gpt2(), **twice)) == said.format(1) + (
        ":\n  clean  |<|endoftext|>|Then|ĠMary|Ġs|m|…|\n  corrupt|<|endoftext|>|Then|ĠMary|Ġs|m|…|"
    )
    for i, call in (
        (0, lambda: Task.from_tokens([[1, 2]], [[1, 2]], [0], [1])),
        (4, lambda: replace(task, corrupt=corrupt)),
        (0, lambda: without_a_difference(task).select([2, 1])),
    ):
        assert full_message(call) == said.format(i)


# -- models that the task is not for ---------------------------------------------------------------


class Never(nn.Module):
    """A model that must not run, with the configuration of a bridge."""

    def __init__(self, **cfg: Any) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(**cfg)

    def forward(self, tokens: Tensor) -> Tensor:
        raise AssertionError("ran")


@pytest.mark.parametrize("call", [KLDivergence.of, lambda m, task: task.filter_correct(m)])
def test_models_that_the_task_is_not_for_are_refused_before_they_run(
    call: Callable[[Any, Task], object],
) -> None:
    """`mixed` has tokens up to 15 on either side, answers to 5, foils to 11, and 4 positions."""
    model, task = Never(d_vocab=15, n_ctx=4, model_name="m").eval(), mixed()
    message = (
        "`{}` must hold token ids below the model's d_vocab {}; got {}; "
        "build the task with the tokenizer of 'm'"
    )
    assert full_message(lambda: call(model, task)) == message.format("clean", 15, 15)
    few = task.select([0])  # tokens 10 and 0, answer 0, foil 6
    for label, d_vocab, changes in (
        ("corrupt", 11, {"corrupt": few.corrupt + 1}),
        ("answers", 11, {"answers": few.answers + 11}),
        ("foils", 11, {"foils": few.foils + 5}),
    ):
        model.cfg.d_vocab = d_vocab
        changed = replace(few, **changes)
        assert full_message(lambda t=changed: call(model, t)) == message.format(label, 11, 11)
        model.cfg.d_vocab = 12
        with pytest.raises(AssertionError, match="ran"):  # the highest token that it has
            call(model, changed)
    model.cfg.d_vocab = 16
    with pytest.raises(AssertionError, match="ran"):  # as many positions as it has
        call(model, task)
    model.cfg.n_ctx = 3
    assert full_message(lambda: call(model, task)) == (
        "prompts must have no more tokens than the model's n_ctx 3; the longest has 4; "
        "drop the longer pairs with task.select"
    )
    del model.cfg.model_name
    model.cfg.d_vocab = 1
    assert "the tokenizer of 'Never'" in full_message(lambda: call(model, task))


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
def test_a_prompt_may_fill_the_context(tiny: Any) -> None:
    for extra in (0, 1):
        task = random_task(tiny, pairs=1, length=int(tiny.cfg.n_ctx) + extra)
        if extra == 0:
            task.must_fit(tiny.cfg, "m")
            assert attribute(tiny, task, components=["embed"]).nodes is not None
        else:
            with pytest.raises(ValueError, match="than the model's n_ctx 64; the longest has 65;"):
                task.must_fit(tiny.cfg, "m")


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
@pytest.mark.parametrize("make", [ioi, lambda given: Task.from_prompts(given, **TEXTS)])
def test_what_is_no_tokenizer_is_refused(tiny: Any, make: Callable[[Any], object]) -> None:
    """A model can be called on text, too."""
    for given in (
        *(tiny, tiny.original_model, None, "gpt2", len),
        *(gpt2().backend_tokenizer, PreTrainedTokenizerFast),
    ):
        assert full_message(lambda given=given: make(given), TypeError) == (
            "`tokenizer` must be a Hugging Face tokenizer; "
            f"got {type(given).__name__}; pass model.tokenizer"
        )


# -- copies ----------------------------------------------------------------------------------------


def second_logit(logits: Tensor, task: Task) -> Tensor:
    return logits[torch.arange(len(task)), task.spans["end"], 1]


class Scaled:
    """A metric with a number of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, logits: Tensor, task: Task) -> Tensor:
        return self.factor * logit_difference(logits, task)


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


@pytest.mark.parametrize("again", COPIES, ids=["deep copy", "another process"])
@pytest.mark.parametrize(
    "metric",
    [
        "logit_difference",
        second_logit,
        Scaled(-2.0),
        KLDivergence(torch.eye(6, 12).log_softmax(-1)),
    ],
    ids=["built in", "function", "object", "divergence"],
)
def test_copies_are_tasks_like_the_first(again: Callable[[Any], Any], metric: Any) -> None:
    task = mixed(metric=metric, name="mix", spans={"end": [0, 2, 1, 3, 1, 0], "first": [0] * 6})
    logits = torch.randn(6, 4, 12, generator=torch.Generator().manual_seed(0))
    made, bound = again(task), again(task.metric)
    for other in (made, bound.task):
        assert other is not task and other.name == "mix" and list(other.spans) == ["end", "first"]
        for one, two in (
            *((getattr(task, label), getattr(other, label)) for label in TEXTS),
            *zip(task.spans.values(), other.spans.values(), strict=True),
        ):
            assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()
        assert other.metric.task is other and other.metric.name == task.metric.name
        assert torch.equal(other.metric(logits), task.metric(logits))
        with pytest.raises(TypeError):
            other.spans["end"] = task.spans["end"]
        for whole, part in zip(task.buckets(2), other.buckets(2), strict=True):
            assert torch.equal(whole[0], part[0]) and torch.equal(whole[1].clean, part[1].clean)
    assert bound is bound.task.metric
    assert list(task.spans) == ["end", "first"] and task.metric.task is task


def test_a_function_without_a_name_stays_in_its_process() -> None:
    task = mixed(metric=lambda logits: logits[:, -1, 0])
    assert copy.deepcopy(task).metric.function is task.metric.function
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(task)


@pytest.mark.parametrize("again", COPIES, ids=["deep copy", "another process"])
def test_copies_give_the_same_scores(tiny: Any, again: Callable[[Any], Any]) -> None:
    task = ragged_task(tiny)
    scores, others = attribute(tiny, task), attribute(tiny, again(task))
    assert torch.equal(scores.nodes, others.nodes) and torch.equal(
        again(scores).nodes, scores.nodes
    )
    assert list(others.spans) == list(scores.spans) and torch.equal(others.clean, scores.clean)


# -- pairs that have little in common --------------------------------------------------------------


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_every_pair_is_read_at_its_own_end(tiny: Any, batch_size: int | None) -> None:
    """Each pair's own run, alone and by hand, wherever its bucket puts it."""
    task = ragged_task(tiny)
    assert sorted(set(task.lengths.tolist())) == [4, 6, 7]
    assert bool((task.spans["end"] < task.lengths - 1).all())
    alone = []
    for i, end in enumerate(task.spans["end"].tolist()):
        with torch.no_grad():
            at_end = tiny(task.clean[i, None, : int(task.lengths[i])])[0, end]
        alone.append(at_end)
    rows, last = range(len(task)), torch.stack(alone)
    wanted = last[rows, task.answers] - last[rows, task.foils]
    chances = last.softmax(-1)
    wanted_chances = chances[rows, task.answers] - chances[rows, task.foils]
    divergence = KLDivergence.of(tiny, task)
    torch.testing.assert_close(divergence.reference, last.log_softmax(-1))
    for metric, values in (
        ("logit_difference", wanted),
        ("probability_difference", wanted_chances),
        (divergence, torch.zeros(5)),
    ):
        for index, bucket in task.with_metric(metric).buckets(batch_size):
            with torch.no_grad():
                got = bucket.metric(tiny(bucket.clean))
            torch.testing.assert_close(got, values[index], rtol=1e-4, atol=1e-5)
            for name, at in task.spans.items():
                assert torch.equal(bucket.spans[name], at[index])
    right = (wanted > 0).nonzero().flatten()
    assert 0 < len(right) < 5
    kept = task.filter_correct(tiny)
    assert torch.equal(kept.answers, task.answers[right])
    assert torch.equal(kept.spans["end"], task.spans["end"][right])


@pytest.mark.parametrize("level", ["node", "edge"])
def test_pairs_together_are_the_pairs_alone(tiny: Any, level: str) -> None:
    task = ragged_task(tiny)
    together = attribute(tiny, task, level=level)
    alone = [attribute(tiny, task.select([i]), level=level) for i in range(len(task))]
    for i, one in enumerate(alone):
        torch.testing.assert_close(together.clean[i], one.clean[0], rtol=1e-4, atol=1e-5)
        if together.nodes is not None and one.nodes is not None:
            length = int(task.lengths[i])
            torch.testing.assert_close(
                together.nodes[i, :, :length], one.nodes[0], rtol=1e-3, atol=1e-5
            )
            assert not bool(together.nodes[i, :, length:].any())
            beyond = together.nodes[i, :, int(task.spans["end"][i]) + 1 :]
            assert not bool(beyond.any())  # nothing after the answer's position can matter
    if together.edges is not None:
        mean = torch.stack([one.edges for one in alone if one.edges is not None]).mean(0)
        torch.testing.assert_close(together.edges, mean, rtol=1e-3, atol=1e-5)
