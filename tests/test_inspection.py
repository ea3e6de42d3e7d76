"""A batch shown as text: every token that is read, and below it what is to be learned after it."""

import numpy as np
import pytest

from jaxgpt.apps.inspection import describe_batch
from jaxgpt.cli import main
from jaxgpt.data.conversations import EncodedConversation
from jaxgpt.data.packing import PackedBatches


def shown(batch, **settings):
    return [[cell.strip() for cell in line.split("│")] for line in describe_batch(batch, str, **settings)]


def test_what_is_read_and_what_is_learned_stand_one_below_the_other():
    rng = np.random.default_rng(0)
    given = [EncodedConversation(rng.integers(0, 9, n).astype(np.int32), rng.random(n) < 0.5) for n in (5, 7, 4)]
    batches = PackedBatches(given, 16, 2, 0)
    lines = shown(batches.batch(0))
    documents = [given[number] for row in batches.packed for number in row]
    rows = [cells for cells in lines if len(cells) > 1]
    assert len(rows) == 2 * len(given)
    for document, read, learned in zip(documents, rows[::2], rows[1::2], strict=True):
        assert read == [str(token) for token in document.tokens[:-1]]
        expected = [
            str(t) if known else "_" for t, known in zip(document.tokens[1:], document.learned[1:], strict=True)
        ]
        assert learned == expected
    assert ["row 0, document 1"] in lines and any("places of padding" in cells[0] for cells in lines)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sentiment", "--rows", "2"], ["row 1, label ", "<|start|>│", "<|extract|>", "and 30 rows more"]),
        (["chat", "--batch", "3", "--rows=1"], ["row 0, document 1", "<|endoftext|>│user│", "and 7 rows more"]),
        (["translate", "--rows", "1"], ["row 0, source", "row 0, target ("]),
    ],
)
def test_batches_of_recipes(capsys, arguments, expected):
    assert main(["inspect", *arguments]) == 0
    out = capsys.readouterr().out
    for words in expected:
        assert words in out


def test_without_the_language_models_loss_no_token_counts(capsys):
    assert main(["inspect", "sentiment", "--rows", "1", "--lm-weight", "0"]) == 0
    out = capsys.readouterr().out
    assert "; 0 next tokens count in the loss" in out and set(out.splitlines()[-3].split("│")[0].split()) == {"_"}


def test_settings_count_and_what_is_cut_is_said(capsys, tmp_path):
    (tmp_path / "a.tsv").write_text("".join(f"so many words {n}\t{n % 2}\n" for n in range(20)))
    flags = ["--data.path", str(tmp_path / "a.tsv"), "--data.max-length", "6", "--data.vocab-size", "260"]
    assert main(["inspect", "sentiment", *flags]) == 0
    out = capsys.readouterr().out
    assert "examples are longer than 6 tokens, and were cut at their end" in out and "so" not in out.split("row 0")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sentimen"], "did you mean sentiment?"),
        (["sentiment", "--batch", "-1"], "batch is -1; it must be at least 0"),
        (["sentiment", "--data.batch", "3"], "there is no setting --data.batch"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(["inspect", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
