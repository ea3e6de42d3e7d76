"""Scores: BLEU is sacrebleu's to the last digit, whatever the sentences; exact match looks at words."""

import random

import pytest

from jaxgpt.tasks.scores import bleu, exact_match


def sentences(rng: random.Random, count: int, longest: int, words: str = "abcdef") -> list[str]:
    return [" ".join(rng.choices(words, k=rng.randrange(longest + 1))) for _ in range(count)]


def nearly(rng: random.Random, sentence: str, words: str = "abcdef") -> str:
    """The same with some words left out and some changed."""
    return " ".join(rng.choice(words) if rng.random() < 0.2 else w for w in sentence.split() if rng.random() < 0.9)


def sacrebleu_score(hypotheses: list[str], references: list[str]) -> float:
    reference = pytest.importorskip("sacrebleu").metrics.BLEU(tokenize="none")
    return reference.corpus_score(hypotheses, [references]).score


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 6, 12, 40])
def test_bleu_is_that_of_sacrebleu(longest):
    rng, scores = random.Random(longest), set()
    for _ in range(60):
        references = sentences(rng, rng.randrange(1, 8), longest)
        for hypotheses in (
            [nearly(rng, reference) for reference in references],
            sentences(rng, len(references), longest),
            sentences(rng, len(references), longest + 3),
            sentences(rng, len(references), longest, "abxyz"),
            references,
        ):
            ours, theirs = bleu(hypotheses, references), sacrebleu_score(hypotheses, references)
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9), (hypotheses, references)
            scores.add(round(ours, 3))
    assert longest < 4 or len(scores) > 50


def test_orders_without_a_match_are_smoothed_as_sacrebleu_does():
    """One word in common; then pairs but no triples; then none of the middle."""
    references = ["a b c d e f g h"]
    for hypothesis in ("a x x x x x", "x a x b x c", "a b x c d x e f", "a b c x d e f x", "h g f e d c b a"):
        score = sacrebleu_score([hypothesis], references)
        assert 0 < score < 50 and bleu([hypothesis], references) == pytest.approx(score, rel=1e-12)


def test_what_has_no_score_is_zero():
    for hypotheses, references in [
        (["x y z v w"], ["a b c d e"]),
        ([""], ["a b c d"]),
        (["", ""], ["", ""]),
        (["a b c d"], [""]),
        (["a b c"], ["a b c"]),  # no four words in a row to compare
    ]:
        assert bleu(hypotheses, references) == sacrebleu_score(hypotheses, references) == 0.0
    assert bleu([], []) == 0.0


def test_identical_texts_score_100_and_others_less():
    rng = random.Random(0)
    for size in (1, 5, 100):
        references = [f"{sentence} a b c d" for sentence in sentences(rng, size, 20)]
        assert bleu(references, references) == pytest.approx(100)
        spaced = [f" {reference.replace(' ', '   ')}\n" for reference in references]
        assert bleu(spaced, references) == pytest.approx(100)
        assert bleu([*references[:-1], "a b c"], references) < 99.99


def test_bleu_is_of_the_whole_corpus_in_any_order():
    rng = random.Random(1)
    references = sentences(rng, 50, 20)
    pairs = [(nearly(rng, reference), reference) for reference in references]
    score = bleu(*map(list, zip(*pairs, strict=True)))
    rng.shuffle(pairs)
    assert bleu(*map(list, zip(*pairs, strict=True))) == score
    assert bleu(*map(list, zip(*pairs, *pairs, strict=True))) == pytest.approx(score)


def test_a_hypothesis_gains_nothing_by_repeating_or_by_leaving_out():
    reference = "a b c d e f g h"
    assert bleu([reference + " " + reference], [reference]) < 70
    assert bleu(["a b c d"], [reference]) == pytest.approx(100 * 2.718281828459045**-1)  # brevity: exp(1 - 8 / 4)


def test_exact_match_is_the_share_of_equal_sentences_whatever_the_spacing():
    rng = random.Random(2)
    for size in (1, 2, 7, 100):
        references = [f"{n} {sentence}" for n, sentence in enumerate(sentences(rng, size, 6))]
        wrong = {n for n in range(size) if rng.random() < 0.3}
        hypotheses = [
            f"{reference} z" if n in wrong else f"  {reference.replace(' ', chr(0xA0) + ' ')}\n"
            for n, reference in enumerate(references)
        ]
        assert exact_match(hypotheses, references) == pytest.approx(1 - len(wrong) / size)
    assert exact_match(["ab"], ["a b"]) == exact_match(["A"], ["a"]) == exact_match([""], ["a"]) == 0.0
    assert exact_match([" "], [""]) == 1.0 and exact_match([], []) == 0.0


def test_each_hypothesis_has_one_reference():
    for score in (bleu, exact_match):
        with pytest.raises(ValueError, match="zip"):
            score(["a", "b"], ["a"])
