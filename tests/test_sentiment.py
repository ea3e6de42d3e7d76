"""The classifier: each text as it would be alone, in its place, with the label as it stands in the training file."""

import json

import numpy as np
import pytest

from jaxgpt import launch
from jaxgpt.apps.sentiment import Classifier
from jaxgpt.cli import main
from jaxgpt.config import ExamplesConfig, FinetuneConfig, GPTConfig, OptimizerConfig, ParallelConfig

TEXTS = ["so very good", "bad", "  ", "good and bad and good and bad and good and bad and good and bad", "x", ""]


def train(folder, rows, **changes):
    """A run of one step on these rows of a table."""
    (folder / "train.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")
    config = FinetuneConfig(
        model=GPTConfig(context=24, layers=1, heads=1, width=8, init_std=0.5, unroll=1),
        data=ExamplesConfig(path=(str(folder / "train.tsv"),), vocab_size=270, batch_size=4, buckets=1, held_out=0.2),
        optimizer=OptimizerConfig(warmup_steps=0), parallel=ParallelConfig("single"), epochs=None, steps=1, samples=0,
        out=str(folder / "run"), **changes,
    )  # fmt: skip
    launch.train(config, recipe="tiny")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rows = [(f"film {number} is {word}", word) for number in range(8) for word in ("good", "bad")]
    return train(tmp_path_factory.mktemp("sentiment"), rows)


@pytest.fixture(scope="module")
def classifier(run):
    return Classifier(run)


def test_each_text_is_judged_as_if_alone_and_in_its_place(classifier):
    together = classifier.classify_batch(TEXTS, batch_size=3)
    assert [judged.texts for judged in together] == [(text,) for text in TEXTS]
    for text, judged in zip(TEXTS, together, strict=True):
        alone = classifier.classify(text)
        assert (judged.label, judged.cut) == (alone.label, alone.cut)
        np.testing.assert_allclose(list(judged.probabilities.values()), list(alone.probabilities.values()), atol=1e-6)
        if text.strip():
            assert sum(judged.probabilities.values()) == pytest.approx(1.0)
            assert judged.label == max(judged.probabilities, key=judged.probabilities.get)
            assert set(judged.probabilities) == {"good", "bad"}
        else:
            assert judged.label is None and judged.probabilities == {}
    assert together[3].cut > 0 == together[1].cut
    assert list(classifier.stream(TEXTS, batch_size=2)) == classifier.classify_batch(TEXTS, batch_size=2)


def test_the_number_of_texts_must_fit(classifier):
    with pytest.raises(ValueError, match="the task classification takes 1 text, and 2 came"):
        classifier.classify("a", "b")
    with pytest.raises(ValueError, match="classify_batch takes several"):
        classifier.classify_batch("a")


def test_pairs_scores_and_choices(tmp_path, capsys):
    rows = [(f"a {n}", f"b {n % 3}", str(1 + n % 5)) for n in range(20)]
    scored = Classifier(train(tmp_path, rows, task="similarity", regression=True))
    one, turned = scored.classify("a 1", "b 2"), scored.classify("b 2", "a 1")
    assert one.label == turned.label and one.probabilities == {}
    assert 0.0 < float(one.label) < 6.0
    assert main(["classify", "--model", str(tmp_path / "run"), "--tsv", "--text", "a 1\tb 2", "a 1"]) == 2
    assert capsys.readouterr().out == f"label\n{one.label}\n\n", "a score has no probabilities"
    (tmp_path / "choice").mkdir()
    chosen = Classifier(
        train(tmp_path / "choice", [(f"q {n}", "yes", "no", str(n % 2)) for n in range(20)], task="multiple-choice")
    )
    three = chosen.classify("q 3", "yes", "no", "maybe")
    assert set(three.probabilities) == {"yes", "no", "maybe"} and three.label in three.probabilities
    two = chosen.classify_batch([("q 3", "yes", "no"), ("q 3", "yes", "no", "maybe")])
    assert len(two[0].probabilities) == 2 and two[1].label == three.label
    with pytest.raises(ValueError, match="takes a context and two answers or more, and 2 texts came"):
        chosen.classify("q", "yes")


def test_the_forms_of_the_output(run, classifier, tmp_path, capsys):
    file = tmp_path / "texts.txt"
    file.write_text("so very good\nbad\n\n", "utf-8")
    expected = classifier.classify_batch(["so very good", "bad"])

    def printed(*more, code=0):
        assert main(["classify", "--model", str(run), *more]) == code
        return capsys.readouterr()

    out, err = printed(str(file), code=2)
    assert out.splitlines() == [f"{j.label}\t{max(j.probabilities.values()):.4f}" for j in expected] + [""]
    assert err == "jaxgpt: line 3: a text is empty, so it has no label\n"
    out, _ = printed(str(file), "--json", code=2)
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["label"] for record in records] == [*(judged.label for judged in expected), None]
    assert records[0]["texts"] == ["so very good"] and records[0]["probabilities"] == expected[0].probabilities
    out, _ = printed("--text", "bad", "--tsv")
    header, row = out.splitlines()
    assert header == "label\tbad\tgood" and row.split("\t")[0] == expected[1].label
    assert [float(share) for share in row.split("\t")[1:]] == pytest.approx(
        list(expected[1].probabilities.values()), abs=1e-4
    )


def test_whatever_comes_a_line_is_a_line(run, classifier, tmp_path, capsys):
    """Of bytes that are no UTF-8 as well; what is judged after them is judged as ever."""
    file = tmp_path / "texts.txt"
    file.write_bytes(b"bad\nb\xffd\n \nbad")
    assert main(["classify", "--model", str(run), str(file), "--tsv"]) == 2
    out, err = capsys.readouterr()
    header, first, *empty, last = out.splitlines()
    assert first == last and first.count("\t") == 2 and empty == ["\t\t"] * 2 and header == "label\tbad\tgood"
    assert err.splitlines() == [
        "jaxgpt: line 2: it is not UTF-8: byte 0xff",
        "jaxgpt: line 3: a text is empty, so it has no label",
    ]


BAD = [
    (["--text", "a", "b.txt"], "--text and a file are both given"),
    (["--json", "--tsv"], "--json and --tsv are both given"),
    (["nowhere.txt"], "there is no file nowhere.txt"),
    (["a.txt", "b.txt"], "one file is labelled at a time, not 2"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(run, capsys, arguments, message):
    if arguments[0] == "--text":
        arguments = ["--file", "b.txt", "--text", "a"]
    assert main(["classify", "--model", str(run), *arguments]) == 2
    _, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1


def test_a_run_of_another_task_is_named(run, capsys):
    assert main(["generate", "--model", str(run), "--prompt", "x"]) == 2
    assert f"what uses it is: jaxgpt classify --model {run}" in capsys.readouterr().err
