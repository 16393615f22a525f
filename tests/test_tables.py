"""Tables of prompts: files and frames in three layouts, and what is refused of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_ioi import gpt2
from test_task import full_message
from transformers import PreTrainedTokenizerFast

from tasks import Task
from tasks.tables import columns_of, read_csv, read_frame, read_jsonl, read_table

ROWS = [
    {
        "clean": "Then Tom smiled at", "corrupt": "Then Paul smiled at",
        "answer": " Tom", "foil": " Paul",
    },
    {"clean": "When, Mary went", "corrupt": "When, John went", "answer": " Mary", "foil": " John"},
]  # fmt: skip
HEADER = "clean,corrupt,answer,foil\n"
FIRST = "Then Tom smiled at,Then Paul smiled at, Tom, Paul\n"
CSV = HEADER + FIRST + '"When, Mary went","When, John went", Mary, John\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return gpt2()


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(text: str | bytes, name: str = "prompts.csv") -> Path:
    path = Path(name)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def from_lists(tokenizer: Any, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Task:
    columns = [[row[name] for row in rows] for name in ("clean", "corrupt", "answer", "foil")]
    return Task.from_prompts(tokenizer, *columns, **options)


def same(one: Task, two: Task) -> bool:
    labels = ("clean", "corrupt", "answers", "foils", "lengths")
    return all(torch.equal(getattr(one, n), getattr(two, n)) for n in labels) and all(
        torch.equal(one.spans[name], two.spans[name]) for name in {*one.spans, *two.spans}
    )


# -- our own layout --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.csv", CSV),
        ("prompts.csv", CSV.replace("\n", "\r\n")),
        ("prompts.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("prompts.csv", CSV.replace("answer,foil", "answers,foils") + "\n"),
        ("prompts.jsonl", lines(ROWS)),
        ("prompts.jsonl", "\n" + lines(ROWS).replace("\n", "\r\n\r\n")),
        ("prompts.jsonl", b"\xef\xbb\xbf" + lines(ROWS).encode()),
        ("PROMPTS.JSONL", lines([dict(reversed(row.items())) for row in ROWS])),
    ],
    ids=["csv", "windows", "mark", "plural", "jsonl", "empty lines", "jsonl mark", "other order"],
)
def test_files_are_the_lists_in_them(tokenizer: Any, name: str, text: str | bytes) -> None:
    path = written(text, name)
    make = Task.from_csv if path.suffix == ".csv" else Task.from_jsonl
    task = make(tokenizer, path)
    assert same(task, from_lists(tokenizer)) and task.name == path.stem
    assert make(tokenizer, str(path), name="mine", metric="probability_difference").name == "mine"
    assert same(task, Task.from_table(tokenizer, read_table(path)))


def test_frames_are_the_lists_in_them(tokenizer: Any) -> None:
    frame = pd.DataFrame(ROWS, index=[7, 7])
    task = Task.from_dataframe(tokenizer, frame)
    assert same(task, from_lists(tokenizer)) and task.name == "task"
    assert same(Task.from_dataframe(tokenizer, frame.astype("category")), task)
    frame = frame.rename(columns={"clean": "sentence_good", "foil": "no"})
    columns = {"clean": "sentence_good", "foils": "no"}
    assert same(Task.from_dataframe(tokenizer, frame, columns=columns), task)
    assert same(Task.from_dataframe(tokenizer, frame[::-1], columns=columns), task.select([1, 0]))


def test_several_answers_stand_in_a_cell(tokenizer: Any) -> None:
    several = [[" Tom", " Mary"], [" Mary"]]
    wanted = from_lists(
        tokenizer, [row | {"answer": a} for row, a in zip(ROWS, several, strict=True)]
    )
    assert wanted.answers.shape == (2, 2)
    cells = ['"["" Tom"", "" Mary""]"', " Mary"]
    text = CSV.replace(", Tom,", f",{cells[0]},")
    assert same(Task.from_csv(tokenizer, written(text)), wanted)
    rows = [row | {"answer": a} for row, a in zip(ROWS, several, strict=True)]
    assert same(Task.from_jsonl(tokenizer, written(lines(rows), "a.jsonl")), wanted)
    for make in (list, tuple, np.array):
        frame = pd.DataFrame(ROWS).drop(columns="answer")
        frame["answers"] = [make(a) for a in several]
        assert same(Task.from_dataframe(tokenizer, frame), wanted)


def test_spans_have_columns_of_their_own(tokenizer: Any) -> None:
    rows = [row | {"span:who": who} for row, who in zip(ROWS, (" Tom", "Mary"), strict=True)]
    task = Task.from_jsonl(tokenizer, written(lines(rows), "a.jsonl"))
    assert same(task, from_lists(tokenizer, spans={"who": [" Tom", "Mary"]}))
    assert [pair.spans["who"][0] for pair in task] == [" Tom", " Mary"]
    named = Task.from_dataframe(
        tokenizer, pd.DataFrame(ROWS), columns={"span:who": "answer"}, spans={"verb": [3, 0]}
    )
    assert named.spans["who"].tolist() == task.spans["who"].tolist()
    assert named.spans["verb"].tolist() == [3, 0]


def test_words_stay_words() -> None:
    """What pandas would read as no value, as numbers or as truth, and spaces at both ends."""
    cells = ["NA", "nan", "None", "1e3", "TRUE", " x ", 'a "b"', "[", "漢字"]
    frame = pd.DataFrame({"clean": cells, "corrupt": cells, "answer": cells, "foil": cells})
    frame.to_csv("prompts.csv", index=False)
    read = columns_of(read_csv("prompts.csv"))
    assert read.clean == read.answers == cells and not read.ids


def test_rows_may_hold_line_ends(tokenizer: Any) -> None:
    table = read_csv(written('clean,corrupt\n"a\nb",c\nd,e\n'))
    assert table.columns == {"clean": ["a\nb", "d"], "corrupt": ["c", "e"]}
    assert table.row(1) == "row 1 of 'prompts.csv' (line 4)"


def test_foils_and_metrics(tokenizer: Any) -> None:
    """No foils where the metric reads none."""
    path = written("\n".join(line.rpartition(",")[0] for line in CSV.splitlines()))
    task = Task.from_csv(tokenizer, path, metric=lambda logits: logits[:, -1, 0])
    assert task.foils.shape == (2, 0)
    whole = Task.from_csv(tokenizer, path, continuation="sum")
    assert whole.metric.name == "log_probability"
    assert "must have a column foil or foils; it has clean, corrupt, answer;" in full_message(
        lambda: Task.from_csv(tokenizer, path)
    )


# -- EAP-IG ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("correct_idx", "incorrect_idx"),
        ("country_idx", "corrupted_country_idx"),
        ("clean_answer_idx", "corrupted_answer_idx"),
    ],
)
def test_columns_of_token_ids(tokenizer: Any, names: tuple[str, str]) -> None:
    """As its files are: an index, texts beside the ids, `corrupted` for `corrupt`."""
    wanted = from_lists(tokenizer)
    text = f",clean,corrupted,answer,{','.join(names)}\n" + "".join(
        f'{9 - i},"{row["clean"]}","{row["corrupt"]}",word,{wanted.answers[i]},{wanted.foils[i]}\n'
        for i, row in enumerate(ROWS)
    )
    assert same(Task.from_csv(tokenizer, written(text)), wanted)
    frame = pd.read_csv("prompts.csv")
    assert same(Task.from_dataframe(tokenizer, frame), wanted)
    assert same(Task.from_dataframe(tokenizer, frame.astype({names[0]: float})), wanted)
    bare = Task.from_dataframe(tokenizer, frame, prepend_bos=False)
    assert torch.equal(bare.clean[0], wanted.clean[0, 1:])


def test_columns_of_sets_of_token_ids(tokenizer: Any) -> None:
    """The hypernyms: lists of ids, and lists of texts in Python's form beside them."""
    text = (
        "clean,answers,answers_idx,corrupted,corrupted_answers_idx\n"
        "Then Tom smiled at,\"['a', 'b']\",\"[3, 4]\",Then Paul smiled at,[5]\n"
    )
    task = Task.from_csv(tokenizer, written(text))
    assert task.answers.tolist() == [[3, 4]] and task.foils.tolist() == [5]


def test_ids_are_those_of_the_tokenizer(tokenizer: Any) -> None:
    size = len(tokenizer)
    text = f"clean,corrupted,correct_idx,incorrect_idx\nThen Tom,Then Paul,3,{size}\n"
    assert full_message(lambda: Task.from_csv(tokenizer, written(text))) == (
        f"token ids of a table must be those of its tokenizer, below {size}; got {size}; take the "
        "tokenizer that the table was made with, or columns of texts"
    )
    path = written(text.replace(str(size), "many"))
    assert full_message(lambda: Task.from_csv(tokenizer, path)) == (
        "column 'incorrect_idx' must hold a token id, or a list of them, in every row; row 0 of "
        "'prompts.csv' (line 2) has 'many', of type str; write it as one, or leave that row out"
    )
    columns = {"answer": "clean"}
    assert "answers and foils must both be texts or both token ids; the columns are" in (
        full_message(lambda: Task.from_csv(tokenizer, path, columns=columns))
    )


# -- MIB -------------------------------------------------------------------------------------------


def mib_ioi() -> list[dict[str, Any]]:
    asked = {"choices": ["Tom", "Mary"], "answerKey": 0}
    other = {"choices": ["Mary", "Tom"], "answerKey": 0}
    third = {"choices": ["Paul", "John"], "answerKey": 1}
    row = {
        "prompt": "When Tom and Mary met, Mary smiled at",
        "metadata": {"indirect_object": "Tom", "subject": "Mary"},
        **asked,
        "s2_io_flip_counterfactual": {"prompt": "When Tom and Mary met, Tom smiled at", **other},
        "abc_counterfactual": {"prompt": "When Paul and John met, Paul smiled at", **third},
    }
    return [row, copy.deepcopy(row)]


def test_names_to_choose_from(tokenizer: Any) -> None:
    path = written(lines(mib_ioi()), "ioi.jsonl")
    for columns, corrupt in (
        (None, "When Tom and Mary met, Tom smiled at"),
        ({"corrupt": "abc_counterfactual"}, "When Paul and John met, Paul smiled at"),
    ):
        task = Task.from_jsonl(tokenizer, path, columns=columns)
        pair = task[1]
        assert (pair.clean, pair.corrupt) == ("When Tom and Mary met, Mary smiled at", corrupt)
        assert (pair.answers, pair.foils) == ((" Tom",), (" Mary",))
    frame = pd.DataFrame(mib_ioi())
    assert same(Task.from_dataframe(tokenizer, frame), Task.from_jsonl(tokenizer, path))


def test_letters_to_choose_from() -> None:
    """Labels as they stand; a counterfactual's may be numbers."""
    row = {
        "prompt": "Answer:",
        "choices": {"label": ["A", "B"], "text": ["red", "blue"]},
        "answerKey": 1,
        "symbol_counterfactual": {
            "prompt": "Answers:",
            "choices": {"label": [1, 2], "text": ["red", "blue"]},
            "answerKey": 0,
        },
    }
    read = columns_of(read_jsonl(written(lines([row, row | {"answerKey": "A"}]), "a.jsonl")))
    assert read.answers == ["B", "A"] and read.foils == ["1", "1"]
    assert read.corrupt == ["Answers:"] * 2


def test_sums() -> None:
    row = {
        "prompt": "2+3=",
        "label": "5",
        "random_counterfactual": {"prompt": "2+4=", "label": 6, "operand1": 2},
        "ones_carry_counterfactual": {"prompt": "2+9=", "label": 11, "operand1": 2},
    }
    read = columns_of(read_frame(pd.DataFrame([row])))
    assert (read.clean, read.corrupt, read.answers, read.foils) == (
        ["2+3="],
        ["2+4="],
        ["5"],
        ["6"],
    )


def test_counterfactuals_are_named() -> None:
    rows = mib_ioi()
    for row in rows:
        row["other_counterfactual"] = row.pop("s2_io_flip_counterfactual")
    assert full_message(lambda: columns_of(read_jsonl(written(lines(rows), "a.jsonl")))) == (
        "'a.jsonl' must be told its counterfactual; it has abc_counterfactual, "
        'other_counterfactual; give columns={"corrupt": "abc_counterfactual"}'
    )
    del rows[1]["abc_counterfactual"]["answerKey"], rows[1]["answerKey"]
    table = read_jsonl(written(lines(rows), "a.jsonl"))
    message = full_message(lambda: columns_of(table, {"corrupt": "abc_counterfactual"}))
    assert message.startswith(
        "row 1 of 'a.jsonl' (line 2) must hold a prompt, choices and an answer"
    )


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "'prompts.csv' must hold at least one row of prompts; it is empty; give the columns "
            "clean, corrupt, answer, foil",
        ),
        (
            HEADER,
            "'prompts.csv' must hold at least one row of prompts; it has a first line alone; give "
            "the columns clean, corrupt, answer, foil",
        ),
        (
            CSV + "a,b,c\n",
            "each row of 'prompts.csv' must have 4 cells, as its first line; row 2 (line 4) has 3; "
            'put texts that hold a comma in double quotes: "…"',
        ),
        (
            CSV + 'a,"b"c,d,e\n',
            "'prompts.csv' must be a table of comma-separated values; row 2 (line 4) is none "
            "(',' expected after '\"'); write it with a library, such as pandas",
        ),
        (
            CSV.encode() + "Café,b,c,d\n".encode("latin-1"),
            "'prompts.csv' must be in UTF-8; line 4 is not (byte 127 of the file is 0xe9); save it "
            "anew in UTF-8",
        ),
        (
            CSV.encode("utf-16"),
            "'prompts.csv' must be in UTF-8; line 1 is not (byte 0 of the file is 0xff); save it "
            "anew in UTF-8",
        ),
        (
            CSV.encode("utf-16-le"),
            "'prompts.csv' must be in UTF-8; line 1 is not (byte 1 of the file is 0x00); save it "
            "anew in UTF-8",
        ),
        (
            CSV + "a,,c,d\n",
            "column 'corrupt' must hold a text in every row; row 2 of 'prompts.csv' (line 4) has "
            "nothing; fill it in, or leave that row out",
        ),
        (
            CSV.replace("clean", "prompt"),
            "'prompts.csv' must have a column clean; it has prompt, corrupt, answer, foil; rename "
            'one, or say which it is: columns={"clean": …}',
        ),
        (
            CSV.replace("corrupt", "clean"),
            "each column of 'prompts.csv' must have a name of its own; 'clean' is there twice; "
            "rename one",
        ),
    ],
    ids=["empty", "no rows", "ragged", "quotes", "latin", "utf-16", "no mark", "cell", "column",
         "twice"],
)  # fmt: skip
def test_files_that_are_no_tables(tokenizer: Any, text: str | bytes, message: str) -> None:
    path = written(text)
    assert full_message(lambda: Task.from_csv(tokenizer, path)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            lines(ROWS) + "[1, 2]\n",
            "each line of 'a.jsonl' must be one JSON object; row 2 (line 3) is list; write lines "
            'such as {"clean": "…", "corrupt": "…", "answer": " …", "foil": " …"}',
        ),
        (
            "\n{clean: 1}\n",
            "each line of 'a.jsonl' must be one JSON object; row 0 (line 2) is no JSON (Expecting "
            "property name enclosed in double quotes at character 1); write lines such as "
            '{"clean": "…", "corrupt": "…", "answer": " …", "foil": " …"}',
        ),
        (
            lines([ROWS[0], {k: v for k, v in ROWS[1].items() if k != "foil"}]),
            "column 'foil' must hold a text, or a list of texts, in every row; row 1 of 'a.jsonl' "
            "(line 2) has nothing; fill it in, or leave that row out",
        ),
        (
            lines([ROWS[0], ROWS[1] | {"answer": []}]),
            "column 'answer' must hold a text, or a list of texts, in every row; row 1 of "
            "'a.jsonl' (line 2) has [], of type list; write it as one, or leave that row out",
        ),
        (
            lines([ROWS[0] | {"answer": 5}]),
            "column 'answer' must hold a text, or a list of texts, in every row; row 0 of "
            "'a.jsonl' (line 1) has 5, of type int; write it as one, or leave that row out",
        ),
    ],
    ids=["list", "no JSON", "a key", "no answer", "a number"],
)
def test_lines_that_are_no_rows(tokenizer: Any, text: str, message: str) -> None:
    path = written(text, "a.jsonl")
    assert full_message(lambda: Task.from_jsonl(tokenizer, path)) == message


@pytest.mark.parametrize("nothing", [float("nan"), None, pd.NA, pd.NaT, ""], ids=str)
def test_cells_without_a_value(tokenizer: Any, nothing: Any) -> None:
    frame = pd.DataFrame(ROWS, dtype=object)
    frame.loc[1, "clean"] = nothing
    assert full_message(lambda: Task.from_dataframe(tokenizer, frame)) == (
        "column 'clean' must hold a text in every row; row 1 of the table has nothing; fill it "
        "in, or leave that row out"
    )


def test_what_is_there_twice_is_never_chosen_for_anybody(tokenizer: Any) -> None:
    both = pd.DataFrame(ROWS).assign(answers=" Ann")
    assert full_message(lambda: Task.from_dataframe(tokenizer, both)) == (
        "the table must have one column for each thing; it has answer and answers; leave one out, "
        'or say which it is: columns={"answer": …}'
    )
    chosen = Task.from_dataframe(tokenizer, both, columns={"answers": "answer"})
    assert same(chosen, from_lists(tokenizer))
    path = written('{"clean": "Then Tom", "clean": "Then Paul"}', "a.jsonl")
    assert full_message(lambda: Task.from_jsonl(tokenizer, path)) == (
        "each column of 'a.jsonl' must have a name of its own; 'clean' is there twice; rename one"
    )


def test_the_tokenizer_comes_first() -> None:
    """Before any file is read: this one is not there."""
    for make in (Task.from_csv, Task.from_jsonl):
        assert "`tokenizer` must be a Hugging Face tokenizer; got str; pass" in (
            full_message(lambda make=make: make("prompts.csv", "none.csv"), TypeError)
        )


def test_what_is_no_table(tokenizer: Any) -> None:
    assert full_message(lambda: Task.from_dataframe(tokenizer, ROWS), TypeError) == (
        "`frame` must be a pandas DataFrame; got list; use Task.from_csv or Task.from_jsonl for "
        "files, and Task.from_prompts for lists"
    )
    assert "the table must hold at least one row" in full_message(
        lambda: Task.from_dataframe(tokenizer, pd.DataFrame(columns=["clean"]))
    )
    assert full_message(lambda: read_table(written("", "a.tsv"))) == (
        "a file of prompts must end in .csv or .jsonl; got 'a.tsv'; save it as one of these, in "
        "UTF-8"
    )
    assert full_message(lambda: columns_of(read_csv(written(CSV)), {"good": "clean"})) == (
        "`columns` must name clean, corrupt, answer, foil or span:NAME; got 'good'; give for "
        'instance {"clean": "sentence_good"}'
    )
    assert full_message(lambda: columns_of(read_csv(written(CSV)), {"clean": "good"})) == (
        "'prompts.csv' must have a column good; it has clean, corrupt, answer, foil; rename one, "
        'or say which it is: columns={"clean": …}'
    )
    for make in (Task.from_csv, Task.from_jsonl):
        with pytest.raises(FileNotFoundError):
            make(tokenizer, "none.csv")


def test_answers_without_their_space_are_told(tokenizer: Any) -> None:
    path = written(HEADER + FIRST.replace(" Tom,", "Tom,"))
    message = full_message(lambda: Task.from_csv(tokenizer, path))
    assert message.startswith("`answers` of pair 0: an answer must be exactly one token ")
    assert "with its leading space (' Tom'), or read all of it with continuation=" in message


# -- many rows -------------------------------------------------------------------------------------


def test_time_grows_with_the_rows(tokenizer: Any) -> None:
    """Tokenizer calls of many texts each, and as many more as there are more rows."""

    class Counting:
        calls, texts = 0, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            type(self).calls += 1
            type(self).texts += len(texts)
            return tokenizer(texts, **options)

        decode = tokenizer.decode
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

    counts: list[tuple[int, int]] = []
    for rows in (2_500, 10_000):
        path = written(HEADER + "Then Tom met,Then Paul met, Tom, Paul\n" * rows)
        Counting.calls = Counting.texts = 0
        assert len(Task.from_csv(Counting(), path)) == rows
        counts.append((Counting.calls, Counting.texts))
    assert counts == [(4, 4 * 2_500), (4 * 3, 4 * 10_000)]
