"""The optimiser: schedules at their landmarks, Optax's own chain, decay on matrices only, Muon on the blocks'."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.config import GPTConfig, OptimizerConfig
from jaxgpt.models.gpt import init_parameters
from jaxgpt.training.optimizer import make_optimizer, make_schedule

STEPS, WARMUP = 200, 20
CONFIG = OptimizerConfig(learning_rate=0.5, final_learning_rate=0.05, warmup_steps=WARMUP, decay_share=0.25)
SCHEDULES = ["cosine", "linear", "inverse-sqrt", "wsd", "constant"]


def rates(positions, **changes):
    schedule = make_schedule(dataclasses.replace(CONFIG, **changes), STEPS)
    return np.array(jax.vmap(schedule)(jnp.asarray(positions, jnp.float32)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(name):
    np.testing.assert_allclose(rates(np.arange(WARMUP + 1), schedule=name), np.arange(WARMUP + 1) / WARMUP, atol=1e-6)
    assert rates([0.5], schedule=name) == pytest.approx(0.5 / WARMUP)


@pytest.mark.parametrize("name", SCHEDULES)
def test_after_the_peak_the_rate_never_rises(name):
    after = rates(np.linspace(WARMUP, 2 * STEPS, 400), schedule=name)
    assert (np.diff(after) <= 1e-7).all() and after.max() == pytest.approx(1.0) and after.min() > 0


@pytest.mark.parametrize(
    ("name", "position", "rate"),
    [
        ("cosine", STEPS, 0.1),
        ("cosine", (WARMUP + STEPS) / 2, 0.55),
        ("cosine", WARMUP + (STEPS - WARMUP) / 3, 0.1 + 0.9 * 0.75),
        ("linear", STEPS, 0.1),
        ("linear", (WARMUP + STEPS) / 2, 0.55),
        ("inverse-sqrt", 4 * WARMUP, 0.5),
        ("inverse-sqrt", 9 * WARMUP, 1 / 3),
        ("wsd", 0.75 * STEPS, 1.0),
        ("wsd", 0.875 * STEPS, 0.55),
        ("wsd", STEPS, 0.1),
        ("constant", STEPS, 1.0),
        ("cosine", 3 * STEPS, 0.1),
        ("linear", 3 * STEPS, 0.1),
        ("wsd", 3 * STEPS, 0.1),
    ],
)
def test_schedules_at_their_landmarks(name, position, rate):
    assert rates([position], schedule=name) == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_the_first_step_is_at_the_peak(name):
    assert rates([0.0], schedule=name, warmup_steps=0) == pytest.approx(1.0)


@pytest.mark.parametrize(("width", "warmup"), [(512, 4000), (64, 10)])
def test_noam_is_the_papers_formula(width, warmup):
    """Vaswani et al. 2017, section 5.3: D^-0.5 min(step^-0.5, step warmup^-1.5), its first step having number 1."""
    config = OptimizerConfig(schedule="noam", warmup_steps=warmup)
    steps = np.array([1, warmup // 2, warmup - 1, warmup + 1, 4 * warmup, 20 * warmup], float)
    ours = jax.vmap(make_schedule(config, STEPS, width))(jnp.asarray(steps))
    np.testing.assert_allclose(ours, width**-0.5 * np.minimum(steps**-0.5, steps * warmup**-1.5), rtol=1e-5)


def random_tree(seed, scale=1.0, dtype="float64"):
    shapes = {
        "blocks": {"kernel": (2, 3, 4), "bias": (2, 4), "scale": (2, 3)},
        "embedding": (5, 3),
        "norm": (3,),
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    random = np.random.default_rng(seed)
    return tree.unflatten([jnp.array(random.normal(scale=scale, size=shape), dtype) for shape in leaves])


MATRICES = {"blocks": {"kernel": True, "bias": False, "scale": False}, "embedding": True, "norm": False}


def run(optimizer, parameters, gradients, ours=True):
    """Parameters after each step."""
    state, seen, update = optimizer.init(parameters), [], jax.jit(optimizer.update)
    for position, gradient in enumerate(gradients):
        extra = {"position": jnp.asarray(float(position))} if ours else {}
        updates, state = update(gradient, state, parameters, **extra)
        parameters = optax.apply_updates(parameters, updates)
        seen.append(parameters)
    return seen


def assert_trees_close(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def test_it_is_optaxs_own_chain(x64):
    """Clipped AdamW under warm-up and cosine, over steps with gradients above and below the clipping norm."""
    config = OptimizerConfig(
        learning_rate=0.1, final_learning_rate=0.01, warmup_steps=3, beta1=0.8, beta2=0.9, epsilon=1e-3,
        weight_decay=0.2, clip_norm=2.0,
    )  # fmt: skip
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 8, 0.01)
    theirs = optax.chain(
        optax.clip_by_global_norm(2.0), optax.adamw(schedule, 0.8, 0.9, 1e-3, weight_decay=0.2, mask=MATRICES)
    )
    parameters = random_tree(0)
    gradients = [random_tree(n + 1, scale=10.0 ** (n % 3 - 1)) for n in range(8)]
    ours = run(make_optimizer(config, 8), parameters, gradients)
    assert_trees_close(
        ours, run(theirs, parameters, gradients, ours=False), rtol=1e-5, atol=1e-7
    )  # Optax's schedule is in float32
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), ours[-1], parameters))) > 0.01


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_touches_matrices_only(x64, name):
    """With zero gradients what changes is decay: p (1 - rate x decay) for matrices, nothing for vectors."""
    config = OptimizerConfig(
        name=name, learning_rate=0.5, muon_learning_rate=0.25, weight_decay=0.2, schedule="constant", warmup_steps=0
    )
    parameters = random_tree(0)
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    (after,) = run(make_optimizer(config, 10), parameters, [zeros])
    kernel = 1 - 0.2 * (0.5 if name == "adamw" else 0.25)
    np.testing.assert_allclose(after["blocks"]["kernel"], parameters["blocks"]["kernel"] * kernel, rtol=1e-12)
    np.testing.assert_allclose(after["embedding"], parameters["embedding"] * 0.9, rtol=1e-12)
    for vector in (lambda p: p["norm"], lambda p: p["blocks"]["bias"], lambda p: p["blocks"]["scale"]):
        np.testing.assert_array_equal(vector(after), vector(parameters))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_matrices_of_a_gpt_are_its_kernels_and_tables(name):
    model = GPTConfig(vocab_size=7, context=4, layers=2, heads=1, width=4, tied_head=False)
    parameters = jax.tree.map(lambda p: p + 1.0, init_parameters(model, jax.random.key(0)))
    config = OptimizerConfig(name=name, weight_decay=0.5, learning_rate=0.1, schedule="constant", warmup_steps=0)
    (after,) = run(make_optimizer(config, 10), parameters, [jax.tree.map(jnp.zeros_like, parameters)])
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(parameters), strict=True)
        if not np.array_equal(a, b)
    }
    kernels = {f"blocks/{name}/kernel" for name in ("attention/qkv", "attention/out", "mlp/up", "mlp/down")}
    assert changed == kernels | {"head", "token_embedding/embedding", "position_embedding/embedding"}


def test_clipping_bounds_the_norm(x64):
    """A gradient above the norm has the effect of the same gradient cut to it; one below is left as it is."""
    parameters, large, small = random_tree(0), random_tree(1, 100.0), random_tree(2, 0.01)
    bounded = jax.tree.map(lambda g: g * 1.5 / optax.global_norm(large), large)
    clipping, free = (
        make_optimizer(OptimizerConfig(clip_norm=norm, warmup_steps=0, learning_rate=0.1), 10) for norm in (1.5, None)
    )
    clipped = run(clipping, parameters, [large, small])
    assert_trees_close(clipped, run(free, parameters, [bounded, small]), rtol=1e-9)
    different = run(free, parameters, [large, small])
    assert float(optax.global_norm(jax.tree.map(jnp.subtract, clipped[-1], different[-1]))) > 1e-3


def test_muon_changes_the_blocks_matrices_by_orthogonal_steps_and_the_rest_as_adamw(x64):
    config = OptimizerConfig(
        name="muon", learning_rate=0.3, muon_learning_rate=0.2, weight_decay=0.1, epsilon=1e-2, warmup_steps=0,
        schedule="constant", clip_norm=1.0,
    )  # fmt: skip
    parameters, gradients = random_tree(0), [random_tree(n) for n in (1, 2)]
    spread = jnp.diag(jnp.array([1.0, 0.3, 0.1]))
    for gradient in gradients:  # singular values far apart, one layer's gradient much larger than the other's
        kernel = spread @ gradient["blocks"]["kernel"]
        gradient["blocks"]["kernel"] = kernel * jnp.array([1.0, 0.01])[:, None, None]
    ours = run(make_optimizer(config, 10), parameters, gradients)
    adam = run(make_optimizer(dataclasses.replace(config, name="adamw"), 10), parameters, gradients)
    for tree in ours + adam:
        del_kernel = tree["blocks"].pop("kernel")
        if tree is ours[0]:
            step = (parameters["blocks"]["kernel"] * (1 - 0.2 * 0.1) - del_kernel) / 0.2
    assert_trees_close(ours, adam, rtol=1e-12)
    values = np.linalg.svd(np.array(step), compute_uv=False) / math.sqrt(4 / 3)  # the shape's scale: sqrt(out / in)
    assert values.shape == (2, 3) and (values > 0.5).all() and (values < 1.5).all()
    for layer in range(2):  # no layer's step depends on another's gradient
        alone = [jax.tree.map(lambda x: x, gradient) for gradient in gradients[:1]]
        alone[0]["blocks"]["kernel"] = alone[0]["blocks"]["kernel"].at[1 - layer].multiply(0.5)
        norm = dataclasses.replace(config, clip_norm=None)
        both = [run(make_optimizer(norm, 10), parameters, g)[0]["blocks"]["kernel"] for g in (gradients[:1], alone)]
        np.testing.assert_allclose(both[0][layer], both[1][layer], rtol=1e-9)


def test_updates_keep_the_type_of_their_parameters():
    parameters = random_tree(0, dtype="bfloat16")
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = optimizer.init(parameters)
    updates, _ = jax.jit(optimizer.update)(parameters, state, parameters, position=jnp.float32(5))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"bfloat16"}


def test_lower_layers_move_by_their_share(x64):
    """The update of each layer is that without decay, times the share to the power of its depth from the top."""
    parameters = {
        "token_embedding": {"embedding": jnp.ones((5, 2))},
        "blocks": {"mlp": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
        "final_norm": {"scale": jnp.ones(2)},
        "task_head": {"kernel": jnp.ones((2, 2))},
    }
    gradients = jax.tree.map(lambda x: 0.1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), parameters)
    updates = []
    for share in (1.0, 0.5):
        config = OptimizerConfig(layer_decay=share, schedule="constant", warmup_steps=0)
        rule = make_optimizer(config, 10)
        updates.append(rule.update(gradients, rule.init(parameters), parameters, position=jnp.float32(0))[0])
    plain, decayed = updates
    for name, share in (("task_head", 1.0), ("final_norm", 1.0), ("token_embedding", 0.5**4)):
        for one, other in zip(jax.tree.leaves(plain[name]), jax.tree.leaves(decayed[name]), strict=True):
            np.testing.assert_allclose(share * one, other, rtol=1e-6)
    for leaf in ("kernel", "bias"):
        for layer in range(3):
            expected = 0.5 ** (3 - layer) * plain["blocks"]["mlp"][leaf][layer]
            np.testing.assert_allclose(expected, decayed["blocks"]["mlp"][leaf][layer], rtol=1e-6)


def test_the_warm_up_may_be_a_share_of_the_steps():
    steps = make_schedule(OptimizerConfig(warmup_steps=30), 300)
    share = make_schedule(OptimizerConfig(warmup_share=0.1, warmup_steps=7), 300)
    for position in (0.0, 5.0, 30.0, 31.0, 200.0, 300.0):
        assert float(share(jnp.float32(position))) == pytest.approx(float(steps(jnp.float32(position))))
