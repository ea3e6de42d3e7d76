"""Scores of judgements: those of their definitions, on random ones."""

import math

import numpy as np
import pytest

from jaxgpt.tasks import judgements


@pytest.mark.parametrize("seed", range(10))
def test_classification_scores_are_their_definitions(seed):
    rng = np.random.default_rng(seed)
    classes = 2 + seed % 4
    labels, chosen = rng.integers(0, classes, (2, 60))
    chosen = np.where(rng.random(60) < 0.5, labels, chosen)
    confusion = judgements.confusion_matrix(labels, chosen, classes)
    assert confusion[1, 0] == np.sum((labels == 1) & (chosen == 0)) and confusion.sum() == 60
    scores = judgements.classification_scores(confusion)
    assert scores["accuracy"] == np.mean(labels == chosen)
    f1 = []
    for one in range(classes):
        right = np.sum((labels == one) & (chosen == one))
        precision, recall = right / max(1, np.sum(chosen == one)), right / max(1, np.sum(labels == one))
        f1.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert scores["f1"] == pytest.approx(f1[1] if classes == 2 else np.mean(f1))
    # Matthews' coefficient is the correlation of the two as indicators of every class.
    indicators = [np.eye(classes)[side] - np.eye(classes)[side].mean(axis=0) for side in (labels, chosen)]
    covariance = [(indicators[a] * indicators[b]).sum() for a, b in ((0, 1), (0, 0), (1, 1))]
    assert scores["matthews"] == pytest.approx(covariance[0] / math.sqrt(covariance[1] * covariance[2]))


def test_a_class_that_never_comes_does_not_count():
    """As in scikit-learn's macro average."""
    confusion = judgements.confusion_matrix(np.array([0, 2, 2]), np.array([0, 2, 0]), 4)
    assert judgements.classification_scores(confusion)["f1"] == pytest.approx(2 / 3)


def test_one_class_said_of_all_has_no_correlation():
    confusion = judgements.confusion_matrix(np.array([0, 1, 1]), np.array([1, 1, 1]), 2)
    assert judgements.classification_scores(confusion) == {"accuracy": 2 / 3, "f1": 0.8, "matthews": 0.0}


@pytest.mark.parametrize("seed", range(5))
def test_correlations(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 40))
    y = y + x
    assert judgements.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert judgements.spearman(x, y) == pytest.approx(
        judgements.pearson(x.argsort().argsort() * 1.0, y.argsort().argsort() * 1.0)
    )
    assert judgements.spearman(np.exp(x), y**3) == pytest.approx(judgements.spearman(x, y)), "of the order alone"
    assert judgements.pearson(x, np.ones(40)) == 0.0


def test_equal_values_share_their_rank():
    assert judgements.spearman(np.array([1.0, 1.0, 2.0]), np.array([3.0, 4.0, 5.0])) == pytest.approx(
        np.corrcoef([1.5, 1.5, 3.0], [1.0, 2.0, 3.0])[0, 1]
    )


def test_the_matrix_is_shown(tmp_path):
    confusion = np.array([[3, 0], [12, 4]])
    table = judgements.confusion_table(confusion, ["no", "maybe $x_1$"])
    assert table.splitlines()[1:] == [
        "             no  maybe $x_1$",
        "         no   3            0",
        "maybe $x_1$  12            4",
    ]
    judgements.draw_confusion(confusion, ["no", "maybe $x_1$"], tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
