"""One table says how everything lies on a mesh: each device has its part, nothing is cut that must stay whole."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt.config import GPTConfig, OptimizerConfig, TransformerConfig
from jaxgpt.models import gpt, sharding, transformer
from jaxgpt.models.sharding import add_up_rows, constrain, make_mesh, mesh_shape, state_shardings
from jaxgpt.tasks import translation
from jaxgpt.training.optimizer import make_optimizer

GPT = GPTConfig(vocab_size=32, context=8, layers=2, heads=4, width=16, tied_head=False)
PAIR = TransformerConfig(vocab_size=32, context=8, heads=4, width=16, encoder_layers=1, decoder_layers=2, dropout=0.2)
MAKE = {
    "gpt": functools.partial(gpt.init_parameters, GPT),
    "pair": functools.partial(transformer.init_parameters, PAIR),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    "shape", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"tensor": 4, "fsdp": 2}, {"tensor": 2, "data": 4}]
)
def test_bytes_of_a_device_fall_with_fsdp_times_tensor(kind, shape):
    """Matrices and their moments are cut; vectors stay whole, or are cut where a head or a hidden unit owns them."""
    parameters = jax.eval_shape(MAKE[kind], jax.random.key(0))
    state = {"parameters": parameters, "moments": jax.eval_shape(make_optimizer(OptimizerConfig(), 1).init, parameters)}
    shardings = state_shardings(state, make_mesh(shape, jax.devices()))
    cut = shape.get("fsdp", 1) * shape.get("tensor", 1)
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        own = math.prod(where.shard_shape(leaf.shape))
        stacked_vector = leaf.ndim <= 1 or min(leaf.shape[-2:]) <= 2
        positions = leaf.shape == (8, 16)  # a table by position is cut along the width alone
        if positions:
            assert own == leaf.size // shape.get("fsdp", 1)
        elif not stacked_vector:
            assert own * cut == leaf.size, leaf.shape


@pytest.mark.parametrize("shape", ["fsdp=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2"])
def test_the_encoder_decoder_over_a_mesh_computes_the_same(shape):
    parameters = drawn(MAKE["pair"], std=0.2)
    random = np.random.default_rng(0)
    source, target, targets = random.integers(0, 32, (3, 8, 7)).astype(np.int32)
    batch = {
        "source": source, "source_length": random.integers(1, 8, 8).astype(np.int32), "target": target,
        "targets": targets, "weights": random.uniform(0, 1, (8, 7)).astype(np.float32),
    }  # fmt: skip
    batch = jax.tree.map(jnp.asarray, batch)
    keys = jax.random.split(jax.random.key(1), 8)
    loss = jax.value_and_grad(lambda parameters: translation.loss(PAIR, 0.1, parameters, batch, keys)[0])
    expected = jax.jit(loss)(parameters)
    mesh = make_mesh(mesh_shape(shape), jax.devices())
    with jax.set_mesh(mesh):
        ours = jax.jit(loss)(jax.device_put(parameters, state_shardings(parameters, mesh)))
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(expected[1]), strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-4 * np.linalg.norm(theirs) + 1e-6


def test_each_device_adds_up_its_own_rows():
    def sums(whole, rows):
        assert rows.shape == (2, 3)  # of 8 rows, over 4 devices
        return jnp.sum(rows @ whole)

    whole, rows = jnp.arange(3.0), jnp.arange(24.0).reshape(8, 3)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())):
        value, gradient = jax.jit(jax.value_and_grad(lambda whole: add_up_rows(sums, whole, rows)))(whole)
        assert jax.jit(lambda x: constrain(x, "batch", "width"))(rows).sharding.shard_shape((8, 3)) == (2, 3)
    np.testing.assert_allclose(value, jnp.sum(rows @ whole))
    np.testing.assert_allclose(gradient, rows.sum(0))


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "width") is x
    assert add_up_rows(lambda whole, rows: (whole, rows), 1, x) == (1, x)


def test_no_parameter_is_cut_twice_along_an_axis(monkeypatch):
    """A rule that the table does not have yet: the axis is named."""
    monkeypatch.setattr(sharding, "LOGICAL_AXES", {"up/kernel": ("layers", "hidden", "heads")})
    with pytest.raises(ValueError, match="up/kernel is to be cut along the mesh axis tensor twice"):
        state_shardings({"up": {"kernel": jnp.ones((1, 8, 8))}}, make_mesh({"tensor": 8}, jax.devices()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mesh_shape("data=2,model=2"), "'model=2' is not AXIS=SIZE with an axis of data, fsdp, tensor"),
        (lambda: mesh_shape("data"), "'data' is not AXIS=SIZE"),
        (lambda: mesh_shape("data=0"), "'data=0' is not AXIS=SIZE"),
        (lambda: mesh_shape("data=2,data=4"), "names the axis data twice"),
        (lambda: make_mesh({"data": 3}, jax.devices()), "data 3 x fsdp 1 x tensor 1 has 3 places, .* 8 devices"),
        (
            lambda: state_shardings({"qkv": {"kernel": jnp.ones((1, 6, 18))}}, make_mesh({"fsdp": 8}, jax.devices())),
            "qkv/kernel .* cannot be cut along the mesh axis fsdp: 8 does not divide 6",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
