"""Labelled examples: every form of file is read, and what is wrong with one is said in a line that names the place."""

import json
import re

import pytest

from jaxgpt.config import ExamplesConfig
from jaxgpt.data.examples import (
    Example,
    choices_of,
    class_names,
    open_examples,
    read_examples,
    score_of,
    score_range,
)

PAIR = "entailment"


def read(path, content, task="classification", **settings):
    path.write_text(content, "utf-8")
    found = read_examples(str(path), "data.path", ExamplesConfig(**settings), task)
    return [(example.texts, example.label) for example in found]


FORMS = [
    ("a.tsv", "good film\t1\nbad\t0\n", "classification", {}),
    ("a.txt", "good film\t1\nbad\t0\n", "classification", {}),
    ("a.tsv", "id\tlabel\tsentence\n7\t1\tgood film\n8\t0\tbad\n", "classification", {}),
    ("a.csv", 'label,text\n1,"good film"\n0,bad\n', "classification", {}),
    ("a.tsv", "what\tsays\n1\tgood film\n0\tbad\n", "classification", {"label": "what", "text": ("says",)}),
    ("a.jsonl", '{"text": "good film", "label": 1}\n\n{"label": "0", "text": "bad"}\n', "classification", {}),
]


@pytest.mark.parametrize(("name", "text", "task", "settings"), FORMS)
def test_every_form_is_read(tmp_path, name, text, task, settings):
    assert read(tmp_path / name, text, task, **settings) == [(("good film",), "1"), (("bad",), "0")]


def test_pairs_and_choices_are_read(tmp_path):
    expected = [(("a dog", "an animal"), "yes")]
    assert read(tmp_path / "a.tsv", "a dog\tan animal\tyes\n", PAIR) == expected
    table = "pair_ID\tsentence_A\tsentence_B\tscore\tlabel\n1\ta dog\tan animal\t4.5\tyes\n"
    assert read(tmp_path / "b.tsv", table, PAIR) == expected
    assert read(tmp_path / "b.tsv", table, "similarity", label="score") == [(("a dog", "an animal"), "4.5")]
    record = {"premise": "a dog", "hypothesis": "an animal", "label": "yes"}
    assert read(tmp_path / "c.jsonl", json.dumps(record), PAIR) == expected
    choice = [(("2 + 2", "3", "4"), "1")]
    assert read(tmp_path / "d.tsv", "2 + 2\t3\t4\t1\n", "multiple-choice") == choice
    record = {"context": "2 + 2", "options": ["3", "4"], "label": 1}
    assert read(tmp_path / "e.jsonl", json.dumps(record), "multiple-choice") == choice
    table = "question,a,b,label\n2 + 2,3,4,1\n"
    assert read(tmp_path / "f.csv", table, "multiple-choice", options=("a", "b")) == choice


WRONG = [
    ("a.tsv", "text\tlabel\nx\t1\t2\n", {}, "line 2, has 3 columns, and the header 2"),
    ("a.tsv", "good film\n", {}, "line 1, has 1 columns and no header names them"),
    ("a.tsv", "text\tlabel\nx\t\n", {}, "line 2: its label is empty"),
    ("a.tsv", "text\tlabel\n \t1\n", {}, "line 2: its text is empty"),
    ("a.tsv", "words\tlabel\nx\t1\n", {}, "which columns hold the text? It has 'words', 'label'"),
    (
        "a.tsv",
        "text\tlabel\nx\t1\n",
        {"label": "sense"},
        "has no column 'sense' (which --data.label names); its first line has 'text', 'label'",
    ),
    ("a.tsv", "text\tlabel\nx\t1\n", {"text": ("word",)}, "has no column 'word'; it has 'text', 'label'"),
    (
        "a.tsv",
        "text\tlabel\nx\t1\n",
        {"text": ("a", "b")},
        "data.text names 2 columns; the task classification takes 1",
    ),
    ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', {}, "line 2, is not JSON"),
    ("a.jsonl", '{"text": "x"}\n', {}, "line 1, has no field 'label'; it has 'text'"),
    ("a.jsonl", '{"text": "x", "label": [1]}\n', {}, "the field 'label' is neither text nor a number"),
    ("a.jsonl", '{"text": 1, "label": 1}\n', {}, "the field 'text' is not text"),
    ("a.tsv", "", {}, "holds no example"),
    ("a.tsv", "sentence\tsense\nx\t1\n", {}, "has no column 'label' (which --data.label names); its first line has"),
    ("a.tsv", "x\t1\n\n\ny\t\n", {}, "line 4: its label is empty"),
    ("a.csv", 'text,label\n"x\ny",1\n\n ,1\n', {}, "line 5: its text is empty"),
    ("a.csv", f"text,label\n{'x' * 200_000},1\n", {}, "line 2, is not CSV: field larger than field limit"),
    ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', {}, "line 1: the field 'text' has half a character"),
    ("a.doc", "x\t1\n", {}, "is neither .tsv"),
]


@pytest.mark.parametrize(("name", "text", "settings", "message"), WRONG)
def test_what_is_wrong_is_said(tmp_path, name, text, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path / name, text, **settings)
    assert "\n" not in str(error.value)


def test_a_pair_with_one_sentence_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"line 2, has 2 columns.*has 3: its texts, then the label"):
        read(tmp_path / "a.tsv", "a\tb\tyes\na\tyes\n", PAIR)
    with pytest.raises(ValueError, match="line 1: a text is empty"):
        read(tmp_path / "a.tsv", "a\t\tyes\n", PAIR)
    with pytest.raises(ValueError, match="there are 1 answers; a choice is between two at least"):
        read(tmp_path / "a.jsonl", '{"context": "a", "options": ["b"], "label": 0}', "multiple-choice")


def test_a_file_that_is_absent_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.path: there is no file .*gone\.tsv"):
        read_examples(str(tmp_path / "gone.tsv"), "data.path", ExamplesConfig(), "classification")


def test_equal_texts_are_on_one_side(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"text {number % 50}\t{number % 2}\n" for number in range(200)))
    sets = open_examples(ExamplesConfig(path=(str(path),), held_out=0.2), "classification")
    train, held_out = ({example.texts for example in part} for part in (sets.train, sets.held_out))
    assert not train & held_out and len(held_out) == 10 and len(sets.train) + len(sets.held_out) == 200
    again = open_examples(ExamplesConfig(path=(str(path),), held_out=0.2), "classification")
    assert again == sets


def labelled(*labels, where="x"):
    return [Example(("t",), label, where) for label in labels]


def test_classes_are_those_of_the_training_examples():
    assert class_names((), labelled("b", "a", "b"), labelled("a")) == ("a", "b")
    assert class_names((), labelled("10", "9", "-1"), []) == ("-1", "9", "10")
    assert class_names((), labelled("nan", "2", "b", "inf", "1"), []) == ("1", "2", "b", "inf", "nan")
    assert class_names(("b", "a", "c"), labelled("a", "b"), labelled("c")) == ("b", "a", "c")
    for given in ((), ("a", "b")):
        with pytest.raises(ValueError, match="one label only, 'a'; there must be two"):
            class_names(given, labelled("a", "a"), [])
    for train, held_out in (("ab", "c"), ("abc", "a")):
        with pytest.raises(ValueError, match="x: the label 'c' is not in the labels; there are 'b', 'a'"):
            class_names(("b", "a"), labelled(*train), labelled(*held_out))
    with pytest.raises(ValueError, match="dev, line 3: the label 'c' is not in the training set; there are 'a', 'b'"):
        class_names((), labelled("a", "b"), labelled("c", where="dev, line 3"))


def test_scores_and_choices():
    assert score_range((), labelled("1", "4.5", "3")) == ("1.0", "4.5")
    with pytest.raises(ValueError, match="x: the label 'high' is no number"):
        score_of(labelled("high")[0])
    with pytest.raises(ValueError, match="no finite number"):
        score_of(labelled("nan")[0])
    with pytest.raises(ValueError, match="one score only, 2"):
        score_range((), labelled("2", "2"))
    assert score_range(("0", "5"), labelled("1", "4.5")) == ("0.0", "5.0")
    for wrong in (("1",), ("5", "0"), ("0", "1", "2")):
        with pytest.raises(ValueError, match="it is the lowest score and the highest"):
            score_range(wrong, labelled("1", "2"))


def questions(*labels, answers=("a", "b")):
    return [Example(("q", *answers), label, f"line {number}") for number, label in enumerate(labels, 1)]


def test_choices_are_places_or_answers():
    assert choices_of(questions("1", "0")) == choices_of(questions("b", "a")) == [1, 0]
    assert choices_of(questions("1", "b")) == [1, 1]
    for wrong in ("2", "c", "\N{SUPERSCRIPT ONE}"):
        with pytest.raises(ValueError, match=r"line 2: .* neither one of its 2 answers nor the place of one, 0 to 1"):
            choices_of(questions("0", wrong))
    numbers = ("7", "1", "0")
    assert choices_of(questions("0", "2", "1", answers=numbers)) == [0, 2, 1], "2 is no answer, so all are places"
    assert choices_of(questions("0", "7", "1", answers=numbers)) == [2, 0, 1], "7 is no place, so all are answers"
    with pytest.raises(ValueError, match="line 1: the label '0' is one of its answers, and the place of another"):
        choices_of(questions("0", "1", answers=numbers))


def test_what_is_made_by_rule_is_balanced_and_held_out_apart():
    sets = open_examples(ExamplesConfig(), "classification")
    train, held_out = ({example.texts for example in part} for part in (sets.train, sets.held_out))
    assert len(train) == 4000 and len(held_out) == 500 and not train & held_out
    for part in (sets.train, sets.held_out):
        assert sum(example.label == "positive" for example in part) == pytest.approx(len(part) / 2, rel=0.1)
    with pytest.raises(ValueError, match=r"--data\.path is needed"):
        open_examples(ExamplesConfig(), PAIR)
