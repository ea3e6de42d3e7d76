"""Documents that share a row: none sees another, exactly, and the loss is that of each alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt.config import AdaptConfig, GPTConfig
from jaxgpt.data.batches import Share
from jaxgpt.data.conversations import EncodedConversation
from jaxgpt.data.packing import PackedBatches, pack
from jaxgpt.models.gpt import GPT, init_parameters, positions_within
from jaxgpt.tasks import chat

MODEL = GPTConfig(vocab_size=19, context=32, layers=2, heads=2, width=8, init_std=0.5, unroll=1)
FORMS = [{}, {"attention": "blocked"}, {"positions": "sinusoidal", "norm": "post"}]
loss = jax.jit(chat.loss, static_argnums=(0, 1))


def documents(seed, count=14, longest=20):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, longest, count)
    return [EncodedConversation(rng.integers(0, 19, size).astype(np.int32), rng.random(size) < 0.6) for size in sizes]


@pytest.mark.parametrize("seed", range(20))
def test_every_document_is_in_one_row_that_has_room(seed):
    rng = np.random.default_rng(seed)
    room = int(rng.integers(5, 40))
    sizes = rng.integers(1, room + 1, rng.integers(1, 60)).tolist()
    rows = pack(sizes, room)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    filled = [sum(sizes[number] for number in row) for row in rows]
    assert max(filled) <= room
    assert sum(size <= room / 2 for size in filled) <= 1, "two rows that are half empty would be one"


def test_positions_begin_anew_in_each_document():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(positions_within(segments), expected)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_losses_are_those_of_each_alone(x64, form, dtype, bound):
    config = dataclasses.replace(MODEL, **form, parameter_dtype=dtype, compute_dtype=dtype)
    parameters = drawn(functools.partial(init_parameters, config))
    whole = []
    for together in (True, False):
        batches = PackedBatches(documents(1), 32, 4, 0, together=together)
        sums = [loss(config, AdaptConfig(), parameters, batch) for batch in batches.in_order()]
        whole.append(np.sum(np.array(sums, np.float64), axis=0))
    assert whole[0][1] == whole[1][1] > 30, "the same targets count"
    np.testing.assert_allclose(whole[0][0], whole[1][0], rtol=bound)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_document_sees_another(form):
    """Exactly: the derivative of one document's loss by the vectors of another is 0."""
    config = dataclasses.replace(MODEL, **form)
    parameters = drawn(functools.partial(init_parameters, config))
    segments = jnp.array([[1] * 5 + [2] * 6 + [3] * 4 + [0] * 3])
    # Each place is a token of its own, so the embedding's rows are the places' input vectors.
    places = jnp.arange(18)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def of_document(embedding, number):
        changed = {**parameters, "token_embedding": {"embedding": embedding}}
        hidden, _ = GPT(config).apply({"params": changed}, places, segments=segments)
        return jnp.sum(jnp.where(segments[..., None] == number, jnp.sin(hidden), 0.0))

    for number in (1, 2, 3):
        seen = np.abs(jax.grad(of_document)(parameters["token_embedding"]["embedding"], number)).sum(axis=1) > 0
        np.testing.assert_array_equal(seen[:18], np.array(segments[0]) == number)


def test_batches_are_a_function_of_the_step_and_hold_every_document_once_an_epoch():
    given = documents(3, 30)
    batches = PackedBatches(given, 32, 4, seed=5)
    for epoch in (0, 1):
        steps = range(epoch * batches.order.batches_per_epoch, (epoch + 1) * batches.order.batches_per_epoch)
        made = [batches.batch(step) for step in steps]
        assert sum(batch["weights"].sum() for batch in made) == sum(one.learned[1:].sum() for one in given)
        again = [PackedBatches(given, 32, 4, seed=5).batch(step) for step in steps]
        for one, other in zip(made, again, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
    targets = np.concatenate([batch["targets"][batch["segments"] > 0] for batch in made])
    assert sorted(targets) == sorted(np.concatenate([one.tokens[1:] for one in given]))


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_shares_of_hosts_are_the_batch(hosts):
    batches = PackedBatches(documents(hosts, 60), 24, 8, 0)
    shares = [Share(host, host + 1, hosts) for host in range(hosts)]
    steps = range(batches.order.batches_per_epoch)
    trained = [(batches.batch(step), *(batches.batch(step, share) for share in shares)) for step in steps]
    held_out = zip(batches.in_order(), *(batches.in_order(share) for share in shares), strict=True)
    for whole, *own in (*trained, *held_out):
        for name, x in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in own]), x, err_msg=name)
