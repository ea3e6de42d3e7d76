"""GPT's input forms: start, delimiter and extract tokens where they belong, and nothing cut in silence."""

import dataclasses

import numpy as np
import pytest

from jaxgpt.config import FinetuneConfig, GPTConfig
from jaxgpt.data.batches import Share
from jaxgpt.data.example_batches import ExampleBatches, encode_examples, input_forms
from jaxgpt.data.examples import Example
from jaxgpt.data.tokenizer import byte_tokenizer

START, DELIMITER, EXTRACT = 257, 258, 259
CONFIG = FinetuneConfig(model=GPTConfig(vocab_size=260, context=64, heads=1, width=4), labels=("no", "yes"))


def forms(task, *texts, limit=64):
    (one,) = input_forms(byte_tokenizer(), 260, task, [texts], limit)
    return [list(tokens) for tokens in one.tokens], one.cut


def test_each_task_has_its_form():
    a, b, c = list(b"ab"), list(b"cde"), list(b"f")
    assert forms("classification", "ab") == ([[START, *a, EXTRACT]], 0)
    assert forms("entailment", "ab", "cde") == ([[START, *a, DELIMITER, *b, EXTRACT]], 0)
    both = [[START, *a, DELIMITER, *b, EXTRACT], [START, *b, DELIMITER, *a, EXTRACT]]
    assert forms("similarity", "ab", "cde") == (both, 0)
    each = [[START, *a, DELIMITER, *b, EXTRACT], [START, *a, DELIMITER, *c, EXTRACT]]
    assert forms("multiple-choice", "ab", "cde", "f") == (each, 0)


def test_the_longest_text_is_cut_and_counted():
    (tokens,), cut = forms("entailment", "abcdefgh", "xyz", limit=9)
    assert tokens == [START, *b"abc", DELIMITER, *b"xyz", EXTRACT] and cut == 5
    (tokens,), cut = forms("classification", "abcdefgh", limit=5)
    assert tokens == [START, *b"abc", EXTRACT] and cut == 5


def test_special_tokens_in_a_text_are_spelled_out():
    (tokens,), _ = forms("classification", "<|endoftext|>")
    assert max(tokens[1:-1]) < 256


def random_examples(seed, task, count=37):
    rng = np.random.default_rng(seed)
    texts = [("x" * rng.integers(1, 30), "y" * rng.integers(1, 9)) for _ in range(count)]
    if task == "classification":
        texts = [one[:1] for one in texts]
    return [Example(one, ("no", "yes")[rng.integers(2)]) for one in texts]


@pytest.mark.parametrize("task", ["classification", "entailment", "similarity"])
def test_batches_hold_every_example_once_an_epoch(task):
    config = dataclasses.replace(CONFIG, task=task)
    given = encode_examples(byte_tokenizer(), config, random_examples(0, task), 64)
    batches = ExampleBatches(given, [12, 40], 8, 3, (1.0, 3.0))
    for epoch in (0, 1):
        steps = range(epoch * batches.order.batches_per_epoch, (epoch + 1) * batches.order.batches_per_epoch)
        made = [batches.batch(step) for step in steps]
        seen = np.concatenate([batch["example"][batch["weights"] > 0] for batch in made])
        assert sorted(seen) == list(range(37))
        for batch in made:
            for row in np.flatnonzero(batch["weights"]):
                sequences = given.sequences[batch["example"][row]].tokens
                assert batch["weights"][row] == (1.0, 3.0)[batch["label"][row]]
                for number, tokens in enumerate(sequences):
                    place = batch["last"][row, number]
                    assert batch["tokens"][row, number, place] == EXTRACT and place == len(tokens) - 1
                    np.testing.assert_array_equal(batch["tokens"][row, number, : place + 1], tokens)
                    np.testing.assert_array_equal(batch["targets"][row, number, :place], tokens[1:])
                    counted = batch["lm_weights"][row, number] > 0
                    assert counted[:place].all() and not counted[place:].any()
            np.testing.assert_allclose(batch["lm_weights"].sum(), batch["weights"].sum(), rtol=1e-5)
    assert sorted(np.concatenate([b["example"][b["weights"] > 0] for b in batches.in_order()])) == list(range(37))


def test_scores_lie_between_minus_one_and_one():
    config = dataclasses.replace(CONFIG, task="similarity", regression=True, labels=("1.0", "5.0"))
    given = [Example(("a", "b"), label) for label in ("1", "3", "5")]
    assert encode_examples(byte_tokenizer(), config, given, 64).labels.tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_shares_of_hosts_are_the_batch(hosts):
    given = encode_examples(byte_tokenizer(), CONFIG, random_examples(hosts, "classification"), 64)
    batches = ExampleBatches(given, [12, 40], 8, 3, (1.0, 3.0))
    shares = [Share(host, host + 1, hosts) for host in range(hosts)]
    steps = range(batches.order.batches_per_epoch)
    trained = [(batches.batch(step), *(batches.batch(step, share) for share in shares)) for step in steps]
    held_out = zip(batches.in_order(), *(batches.in_order(share) for share in shares), strict=True)
    for whole, *own in (*trained, *held_out):
        for name, x in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in own]), x, err_msg=name)
