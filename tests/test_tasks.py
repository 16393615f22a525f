"""The ready tasks: what each asks, read again from its text by other means than it was drawn."""

import random
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from string import Formatter
from types import SimpleNamespace
from typing import Any

import pytest
import test_ioi
import torch
from test_ioi import BYTES, FAMILIES, llama_new, metaspace, with_bos
from test_ioi import whole_words as only_words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tasks import Task, able, zoo
from tasks.prompts import fill, whole_words
from tasks.registry import TASKS, about, builder, check_task, known_circuit
from tasks.zoo.shelf import shipped

ENOUGH = 11
WHOLE = (*range(1100, 1800, 100), 1776, 1799)
"""Years that are one token by themselves, as some are in GPT-2: they are not split to be asked for,
and yet right or wrong behind their century."""


def vocabulary() -> list[str]:
    """Every word of every task, as often as a tokenizer needs to keep it whole."""
    found: list[str] = []
    for function in dict.fromkeys(known.function for known in TASKS.values()):
        for value in vars(import_module(f"tasks.{function}")).values():
            if isinstance(value, dict):
                value = [*value, *value.values()]
            if isinstance(value, str):
                value = [value]
            if isinstance(value, list | tuple):
                texts = [v for v in value if isinstance(v, str)]
                found += ["".join(p for p, *_ in Formatter().parse(t)) for t in texts]
    subjects = import_module("tasks.subject_verb")
    found += [subjects.PLURALS.get(n, f"{n}s") for n in (*subjects.NOUNS, *subjects.OBJECTS)]
    return [f" {word}" for text in found for word in (text, *text.split())] * 3


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, but every digit is a token."""
    before = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return trained(before)


@cache
def two_digits() -> PreTrainedTokenizerFast:
    """As GPT-2's in that two digits are one token."""
    texts = [f" {n}" for n in range(10, 18)] * 99 + [f"{n:02}" for n in range(100)] * 99
    whole = [f" {year}" for year in WHOLE] * 99
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), texts + whole)


@cache
def spaces() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space begins a token as "▁", and every digit is one."""
    before = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *BYTES, *"0123456789"]
    learned = test_ioi.trained(before, special=special, size=6000, texts=vocabulary())
    return llama_new(
        Tokenizer(models.BPE(**learned, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    )


def trained(before: Any, more: list[str] | None = None) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = before, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([*vocabulary(), *(more or [])], trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "digits": byte_level,
    "two digits": two_digits,
    "spaces": spaces,
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def texts(tokenizer: Any, task: Task, i: int) -> tuple[str, str, list[str], list[str]]:
    """Clean and corrupt prompt of a pair, its answers and its foils, without spaces around."""
    prompts = [
        tokenizer.decode(side[i, 1 : task.lengths[i]]) for side in (task.clean, task.corrupt)
    ]
    sets = [
        [tokenizer.decode([t]).strip() for t in ids[i].reshape(-1).tolist() if t >= 0]
        for ids in (task.answers, task.foils)
    ]
    return prompts[0], prompts[1], sets[0], sets[1]


# -- what each asks, read from its text ------------------------------------------------------------


def ioi_answer(text: str) -> str:
    names = [w for w in re.findall(r"\w+", text) if w in import_module("tasks.ioi").NAMES]
    return next(n for n in names if names.count(n) == 1)


def pronoun(text: str) -> str:
    women = import_module("tasks.ioi").WOMEN
    return "she" if any(w in women for w in re.findall(r"\w+", text)) else "he"


def repeated(text: str) -> str:
    first, second = text.removeprefix("List: ").split(", ")
    listed, again = first.split(), second.split()
    at = [i for i, word in enumerate(listed[:-1]) if word == again[-1]]
    return listed[at[0] + 1] if at else ""


def argument(text: str) -> str:
    names = re.search(r"\(self, (.*)\):", text).group(1).split(", ")  # type: ignore[union-attr]
    described = re.findall(r":param (\w+):", text)
    return names[len(described)] if described == names[: len(described)] else ""


def color(text: str) -> str:
    colors = dict(re.findall(r"(\w+) is (\w+)(?:,| and|\.)", text))
    return colors[re.search(r"So the (\w+) is$", text).group(1)]  # type: ignore[union-attr]


def capital(text: str) -> str:
    capitals = import_module("tasks.capital_country").CAPITALS
    return next(capitals[w] for w in re.findall(r"\w+", text) if w in capitals)


def total(text: str) -> str:
    *worked, asked = text.split(", ")
    for example in worked:
        x, y, z = map(int, re.findall(r"\d", example))
        assert x + y == z
    return str(sum(map(int, re.findall(r"\d", asked))))


def letter(text: str) -> str:
    said = re.search(r"^A \w+ is (\w+)\.", text).group(1)  # type: ignore[union-attr]
    return {c: k for k, c in re.findall(r"\n([A-D])\. (\w+)", text)}[said]


READ = {
    "ioi": ioi_answer,
    "gendered_pronoun": pronoun,
    "induction": repeated,
    "docstring": argument,
    "colored_objects": color,
    "capital_country": capital,
    "arithmetic": total,
    "multiple_choice": letter,
}


@pytest.mark.parametrize("name", READ)
def test_answer_and_foil_are_right_for_the_clean_and_the_corrupt_prompt(
    tokenizer: Any, name: str
) -> None:
    task = builder(name)(tokenizer, pairs=ENOUGH, seed=3)
    for i in range(ENOUGH):
        clean, corrupt, answers, foils = texts(tokenizer, task, i)
        assert [READ[name](clean)] == answers, clean
        assert [READ[name](corrupt)] == foils, corrupt


@pytest.mark.parametrize(
    ("name", "corruption", "read"),
    [
        ("induction", "prefix", repeated),
        ("docstring", "definition", argument),
        ("colored_objects", "colors", color),
        ("arithmetic", "second", total),
        ("multiple_choice", "color", letter),
    ],
)
def test_the_other_corruptions(
    tokenizer: Any, name: str, corruption: str, read: Callable[[str], str]
) -> None:
    task = builder(name)(tokenizer, pairs=ENOUGH, seed=1, corruption=corruption)
    for i in range(ENOUGH):
        clean, corrupt, answers, foils = texts(tokenizer, task, i)
        assert [read(clean)] == answers
        nothing = corruption in ("prefix", "definition")  # is asked for any more
        assert [read(corrupt)] == ([""] if nothing else foils)


def test_greater_than_has_the_years_above_on_one_side_and_the_rest_on_the_other(
    tokenizer: Any,
) -> None:
    task = builder("greater_than")(tokenizer, pairs=ENOUGH)
    assert task.metric.name == "probability_difference"
    for i in range(ENOUGH):
        clean, corrupt, answers, foils = texts(tokenizer, task, i)
        century, year, again = re.search(  # type: ignore[union-attr]
            r"year (\d\d)(\d\d) to the year (\d\d)$", clean
        ).groups()
        assert century == again and corrupt == clean.replace(century + year, f"{century}01")
        at = year[: len(answers[0])]
        assert min(answers) > at >= max(foils)
        if len(at) == 1:
            assert {*answers, *foils} == {*"0123456789"} - {at}
        else:
            assert {*answers, *foils} == {f"{n:02}" for n in range(100)} and at in foils
        start = int(task.spans["year"][i])
        assert tokenizer.decode(task.clean[i, start : start + 1]) == at


@pytest.mark.parametrize("corruption", ["flip", "noun"])
@pytest.mark.parametrize("structure", ["simple", "prepositional", "relative"])
def test_verbs_agree_with_their_subject(tokenizer: Any, structure: str, corruption: str) -> None:
    task = builder(f"subject_verb_{structure}")(tokenizer, pairs=ENOUGH, corruption=corruption)
    assert task.name == f"subject_verb_{structure}{'_noun' if corruption == 'noun' else ''}"
    where = 2 if structure == "simple" else 1
    for i in range(ENOUGH):
        clean, corrupt, answers, foils = texts(tokenizer, task, i)
        one, other = clean.split()[where], corrupt.split()[where]
        for noun, verbs in ((one, answers), (other, foils)):
            many = noun.endswith("s") or noun == "children"
            assert verbs == (["are", "were", "have"] if many else ["is", "was", "has"])
        same = {
            one.removesuffix("s").removesuffix("ren"),
            other.removesuffix("s").removesuffix("ren"),
        }
        assert (len(same) == 1) == (corruption == "flip")
        assert tokenizer.decode(task.clean[i, task.spans["subject"][i]]).strip() == one


# -- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_pairs_are_as_many_as_asked_for_all_different_and_of_one_length(
    tokenizer: Any, name: str
) -> None:
    make = builder(name)
    task = make(tokenizer, pairs=13, seed=5)
    assert task.name == name and len(task) == 13 and len(set(task.lengths.tolist())) == 1
    both = torch.cat([task.clean, task.corrupt], 1)
    assert len(both.unique(dim=0)) == 13
    again, other = make(tokenizer, pairs=13, seed=5), make(tokenizer, pairs=13, seed=6)
    assert torch.equal(again.clean, task.clean) and torch.equal(again.corrupt, task.corrupt)
    assert not torch.equal(other.clean, task.clean)
    assert set(task.spans) > {"end"}
    bare = make(tokenizer, pairs=13, seed=5, prepend_bos=False)
    assert torch.equal(bare.clean, task.clean[:, 1:])
    for span, at in bare.spans.items():
        assert torch.equal(at + 1, task.spans[span])


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"ioi_abc"}))
def test_a_corruption_that_is_none_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"`corruption` must be '.*'; got 'swap'; '.*' \w+s "):
        builder(name)(byte_level(), corruption="swap")


def test_more_pairs_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        builder("capital_country")(byte_level(), pairs=100_000)
    found = re.fullmatch(
        r"there must be as many different pairs as are asked for; got 100000 where (\d+) can be "
        r"drawn for this tokenizer; ask for fewer, or for mixed_lengths=True",
        str(error.value),
    )
    assert found and 500 < int(found.group(1)) < 35 * 34 * 5


def test_words_in_pieces_are_told_with_the_nearest_that_are_whole() -> None:
    tokenizer = FAMILIES["ioi-gpt2"]()
    with pytest.raises(ValueError) as error:
        whole_words(tokenizer, ("books", "Marie", "xylophone"), least=2, what="things")
    assert str(error.value) == (
        "the tokenizer must keep at least 2 of 3 things as one token after a space; got 0 (none); "
        "the nearest that it has to 'books': 'book', 'Marie': 'Maria', 'Mar', 'Martin'; use a "
        "tokenizer with a larger vocabulary, or build the pairs with Task.from_prompts"
    )


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "subject_verb_relative",
            "author student students teacher doctor child artist farmer driver singer",
            "the tokenizer must keep at least 4 of 20 nouns, each both as one and as many, as one "
            "token after a space; got 1 (student and students); ",
        ),
        (
            "capital_country",
            "France Germany Italy Spain Japan Paris China Rome Russia",
            "the tokenizer must keep at least 4 of 35 countries, each with its capital, as one "
            "token after a space; got 2 (France and Paris, Italy and Rome); ",
        ),
    ],
)
def test_words_that_belong_together_must_all_be_whole(name: str, words: str, message: str) -> None:
    tokenizer = only_words(["Then", *words.split()])
    with pytest.raises(ValueError) as error:
        builder(name)(tokenizer)
    assert str(error.value).startswith(message)


def test_years_that_are_never_split_are_an_error() -> None:
    with pytest.raises(ValueError, match="must split at least 20 years behind the century, as 17"):
        builder("greater_than")(with_bos(metaspace(size=400)))


def test_a_filled_template_knows_where_its_words_are() -> None:
    made = fill("{A} saw {B} and {A2}", A="Mary", B="Tom", A2="Mary")
    assert str(made) == "Mary saw Tom and Mary"
    assert [made.text[a:b] for a, b in made.slots.values()] == ["Mary", "Tom", "Mary"]
    row = byte_level()("Mary saw Tom and Mary").input_ids
    at = made.tokens(byte_level(), "A2", [0, *row], bos=1)
    assert at.stop == len(row) + 1 and byte_level().decode([0, *row][at.start : at.stop]) == " Mary"


@pytest.mark.parametrize("name", shipped())
def test_what_is_recorded_of_shipped_models_is_what_they_do(name: str) -> None:
    recorded, measured = able.recorded()[name], able.measured(zoo.load(name))
    assert recorded == pytest.approx(measured, nan_ok=True)
    assert recorded["ioi"] > 0.95 and list(recorded) == list(TASKS)


# -- by name ---------------------------------------------------------------------------------------


def test_every_task_has_a_line_about_it_and_its_source() -> None:
    for name, known in TASKS.items():
        assert 5 < len(about(name)) < 45 and "\n" not in about(name)
        function = getattr(import_module(f"tasks.{known.function}"), known.function)
        assert "Source: " in function.__doc__ and ">>> " in function.__doc__


def test_published_circuits_are_of_heads_that_the_model_has() -> None:
    ioi = known_circuit("ioi", "gpt2")
    heads = [head for role in ioi.values() for head in role]
    assert len(heads) == len(set(heads)) == 26 and ioi == known_circuit("ioi_abc", "gpt2-small")
    years = known_circuit("greater_than", "openai-community/gpt2")
    assert len(years["head"]) == 9 and years["mlp"][-1] == "L11.mlp"
    for head in (*heads, *years["head"]):
        layer, number = re.fullmatch(r"L(\d+)H(\d+)", head).groups()  # type: ignore[union-attr]
        assert int(layer) < 12 and int(number) < 12
    assert len(known_circuit("docstring", "attn-only-4l")["head"]) == 8


def test_a_model_or_task_without_a_published_circuit_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        known_circuit("ioi", "ioi-gpt2")
    assert str(error.value) == (
        "the model must be one whose circuit was published for this task: gpt2; got 'ioi-gpt2'; "
        "judge others by exact patching"
    )
    with pytest.raises(ValueError, match="must be one whose circuit was published; none is known"):
        known_circuit("induction", "gpt2")
    with pytest.raises(ValueError, match="the task must be one of ioi, .*; got 'io'; `relp tasks`"):
        check_task("io")


def test_drawing_leaves_global_randomness_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # the type checker of the tests draws from `random` itself: leave the class of generators only
    monkeypatch.setattr("tasks.prompts.random", SimpleNamespace(Random=random.Random))
    torch_state = torch.get_rng_state()
    for name in TASKS:
        builder(name)(byte_level(), pairs=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
