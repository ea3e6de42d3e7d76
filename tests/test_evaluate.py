"""Evaluation: every token is predicted once, from as much as the stride leaves, and the sums are right."""

import json
import math

import jax
import numpy as np
import pytest
from test_api import model_with

from jaxgpt import api, evaluate
from jaxgpt.cli import main
from jaxgpt.models.gpt import GPT, output_head
from jaxgpt.models.losses import unembed

CONTEXT = 16


@pytest.fixture(scope="module")
def model():
    return model_with(CONTEXT)


def one_by_one(model, ids, stride):
    """The losses of a document, each token predicted by a forward pass of its own."""

    @jax.jit
    def losses(tokens):
        hidden, _ = GPT(model.config).apply({"params": model.parameters}, tokens)
        return -jax.nn.log_softmax(unembed(hidden, output_head(model.parameters)))

    result = []
    for place in range(1, len(ids)):
        # The first window that reaches the token; later ones begin `stride` further on.
        begin = 0 if place <= CONTEXT else -(-(place - CONTEXT) // stride) * stride
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : place - begin] = ids[begin:place]
        result.append(float(losses(padded)[0, place - begin - 1, ids[place]]))
    return result


@pytest.mark.parametrize("stride", [1, 5, CONTEXT // 2, CONTEXT])
def test_each_token_is_predicted_once_from_what_the_stride_leaves(model, tmp_path, stride):
    texts = ["x" * 3 + "the quick brown fox, " * 3, "é", "a", "ünïcödé" * 4, "0123456789abcdef", "0123456789abcdefg"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    paths = [str(tmp_path / f"{number}.txt") for number in range(len(texts))]
    result = evaluate.evaluate(model, paths, stride=stride, batch_size=3, per_token=str(tmp_path / "losses"))
    records = [json.loads(line) for line in (tmp_path / "losses").read_text().splitlines()]
    encoded = [model.tokenizer.encode(text) for text in texts]
    expected = [(d, p, ids[p]) for d, ids in enumerate(encoded) for p in range(1, len(ids))]
    assert [(r["document"], r["position"], r["token"]) for r in records] == expected
    losses = [loss for ids in encoded for loss in one_by_one(model, ids, stride)]
    np.testing.assert_allclose([record["loss"] for record in records], losses, rtol=1e-4)
    assert result.tokens == len(losses) and result.documents == len(texts)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bytes == sum(len(text.encode()) - 1 for text in texts), "a byte tokenizer: all bytes but the first"
    assert result.bits_per_byte == pytest.approx(np.sum(losses) / math.log(2) / result.bytes)


def test_the_batch_does_not_change_the_result(model, tmp_path):
    (tmp_path / "text").write_text("some text, " * 20)
    results = [evaluate.evaluate(model, [str(tmp_path / "text")], batch_size=size) for size in (1, 7)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6) and results[0].stride == CONTEXT // 2


def test_the_command_prints_a_table_or_json(model, tmp_path, capsys):
    api.export(model, tmp_path / "model")
    (tmp_path / "text").write_text("some text, " * 20)
    common = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "text")]
    assert main(common) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main([*common, "--json", "--stride", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["stride"] == 4
    assert main([*common, "--stride", "17"]) == 2
    assert "stride is 17, more than the context of 16" in capsys.readouterr().err
    (tmp_path / "text").write_text("a")
    assert main(common) == 2
    assert "no token to predict" in capsys.readouterr().err
