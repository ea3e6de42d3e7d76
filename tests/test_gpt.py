"""GPT: cached decoding is decoding, causality is exact, gradients are derivatives, options are what they say."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import random_gpt

from jaxgpt.config import GPTConfig
from jaxgpt.models.blocks import decoding_parameters
from jaxgpt.models.cache import empty_cache
from jaxgpt.models.gpt import GPT, decode_step, init_parameters, next_token_logits, output_head, prefill
from jaxgpt.models.losses import cross_entropy

TINY = GPTConfig(vocab_size=50, context=24, layers=3, heads=2, width=16, unroll=1)
FLOAT64 = {"parameter_dtype": "float64", "compute_dtype": "float64"}


def random_tokens(seed, batch, length, vocab_size=50):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, parameters, tokens, **kwargs):
    hidden, _ = GPT(config).apply({"params": parameters}, tokens, **kwargs)
    return next_token_logits(config, parameters, hidden)


def mean_loss(config, parameters, tokens, **kwargs):
    total, weight = cross_entropy(
        logits_of(config, parameters, tokens[:, :-1], **kwargs), tokens[:, 1:], jnp.ones(tokens[:, 1:].shape)
    )
    return total / weight


@pytest.mark.parametrize("size", [65, 1000])
def test_initial_loss_is_that_of_a_uniform_guess(size):
    config = GPTConfig(vocab_size=size, context=64, layers=2, heads=4, width=128, unroll=1)
    loss = jax.jit(mean_loss, static_argnums=0)(
        config, init_parameters(config, jax.random.key(0)), random_tokens(1, 8, 65, size)
    )
    assert abs(loss / math.log(size) - 1) < 0.02


CHANGES = {
    "default": {},
    "no bias": {"bias": False},
    "untied": {"tied_head": False},
    "sinusoidal": {"positions": "sinusoidal"},
    "blocked": {"attention": "blocked"},
    "post-norm": {"norm": "post"},
    "post-norm, no bias": {"norm": "post", "bias": False},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "tanh": {"activation": "tanh"},
    "unscaled": {"scale_attention": False},
    "by layer": {"scale_attention_by_layer": True},
    "unscaled, by layer": {"scale_attention": False, "scale_attention_by_layer": True},
    "hidden": {"hidden": 20},
    "epsilon": {"norm_epsilon": 0.1},
    "relu squared": {"activation": "relu-squared"},
    "swiglu": {"activation": "swiglu"},
    "rms": {"normalizer": "rms"},
    "query and key norm": {"qk_norm": True},
    "rotary": {"positions": "rotary"},
    "shared keys": {"kv_heads": 1},
    "scaled embeddings": {"scale_embeddings": True},
    "window": {"window": 6},
    "capped logits": {"logit_cap": 2.0},
    "modern": {
        "positions": "rotary", "normalizer": "rms", "qk_norm": True, "kv_heads": 2, "heads": 4,
        "activation": "swiglu", "tied_head": False, "bias": False, "window": 6,
    },
}  # fmt: skip


def small(change, dtype="float64"):
    settings = {"heads": 2, "parameter_dtype": dtype, "compute_dtype": dtype} | CHANGES[change]
    return GPTConfig(vocab_size=23, context=16, layers=2, width=8, unroll=1, **settings)


@pytest.mark.parametrize(
    ("change", "dtype", "tolerance"),
    [*((change, "float64", 1e-10) for change in CHANGES), ("default", "float32", 1e-4), ("untied", "float32", 1e-4)],
)
def test_causality_is_exact_and_cached_decoding_equals_uncached(x64, change, dtype, tolerance):
    """Ragged prompts, padded with tokens that must not matter; then steps of one token and of several."""
    config = small(change, dtype)
    parameters = random_gpt(config)
    tokens, lengths = np.array(random_tokens(1, 4, 16, 23)), np.array([5, 1, 8, 3], np.int32)
    whole = np.array(logits_of(config, parameters, tokens))

    # A later token changes nothing earlier, by exactly nothing, and everything later by something.
    later = tokens.copy()
    later[:, 9] = (later[:, 9] + 1) % 23
    difference = np.abs(logits_of(config, parameters, later) - whole)
    assert difference[:, :9].max() == 0
    assert (difference[:, 9:].max(axis=(0, 2)) > 0).all()

    parameters = decoding_parameters(parameters)
    step = jax.jit(decode_step, static_argnums=0)
    rows = np.arange(4)
    # Behind each prompt stands another text, which ends up in the cache behind it.
    padded = np.where(np.arange(8) < lengths[:, None], tokens[:, :8], tokens[:, 8:])
    logits, cache = jax.jit(prefill, static_argnums=(0, 4))(config, parameters, padded, lengths, 16)
    np.testing.assert_allclose(logits, whole[rows, lengths - 1], atol=tolerance)
    several = dtype == "float64" and change in ("default", "post-norm", "sinusoidal")
    for count in (1, 3, 1, 3) if several else (2, 2, 2, 2):  # each number is compiled
        np.testing.assert_array_equal(cache.length, lengths)
        places = lengths[:, None] + np.arange(count)
        logits, cache = step(config, parameters, tokens[rows[:, None], places], cache)
        np.testing.assert_allclose(logits, whole[rows[:, None], places], atol=tolerance)
        lengths = lengths + count

    # Set back to what was right, it goes on as if the rest had never been.
    cache = dataclasses.replace(cache, length=jnp.array(lengths - 4, jnp.int32))
    places = lengths[:, None] - 4 + np.arange(count)
    logits, _ = step(config, parameters, tokens[rows[:, None], places], cache)
    np.testing.assert_allclose(logits, whole[rows[:, None], places], atol=tolerance)


def by_the_formulas(config, parameters, tokens):
    """The logits in plain NumPy (Radford et al. 2018, 2019), one head and one block after another."""
    p = jax.tree.map(np.array, parameters)
    width, length = config.head_width, tokens.shape[1]

    def norm(x, layer):
        x = x - x.mean(-1, keepdims=True) if config.normalizer == "layer" else x
        spread = np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
        return x / spread * layer["scale"] + layer.get("bias", 0)

    def prepared(x):
        """Queries or keys of one head."""
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) if config.qk_norm else x
        if config.positions != "rotary":
            return x
        turn = np.exp(1j * np.arange(length)[:, None] * 10_000.0 ** (-2 * np.arange(width // 2) / width))
        turned = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def dense(x, layer):
        return x @ layer["kernel"] + layer.get("bias", 0)

    def attention(x, layer, number):
        heads = []
        kv_heads = config.kv_heads or config.heads
        places = [config.width, config.width + kv_heads * width]
        query, key, value = np.split(dense(x, layer["qkv"]), places, axis=-1)
        for head in range(config.heads):
            shared = head * kv_heads // config.heads
            q = prepared(query[..., head * width :][..., :width])
            k = prepared(key[..., shared * width :][..., :width])
            v = value[..., shared * width :][..., :width]
            scores = q @ k.swapaxes(-1, -2) / (np.sqrt(width) if config.scale_attention else 1)
            scores = scores / (number + 1 if config.scale_attention_by_layer else 1)
            seen = np.tri(length) - (np.tri(length, k=-config.window) if config.window else 0)
            weights = np.exp(scores) * seen
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        return dense(np.concatenate(heads, axis=-1), layer["out"])

    functions = {
        "gelu_new": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "tanh": np.tanh,
        "relu-squared": lambda x: np.maximum(x, 0) ** 2,
        "swiglu": lambda x: (a := np.split(x, 2, axis=-1))[0] / (1 + np.exp(-a[0])) * a[1],
    }

    def mlp(x, layer):
        return dense(functions[config.activation](dense(x, layer["up"])), layer["down"])

    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, config.width, 2) / config.width)
    positions = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, config.width)
    if config.positions == "learned":
        positions = p["position_embedding"]["embedding"][:length]
    x = p["token_embedding"]["embedding"][tokens] * (np.sqrt(config.width) if config.scale_embeddings else 1)
    x = x + (0 if config.positions == "rotary" else positions)
    for number in range(config.layers):
        block = jax.tree.map(lambda leaf: leaf[number], p["blocks"])  # noqa: B023
        first, second = block["attention_norm"], block["mlp_norm"]
        if config.norm == "pre":
            x = x + attention(norm(x, first), block["attention"], number)
            x = x + mlp(norm(x, second), block["mlp"])
        else:
            x = norm(x + attention(x, block["attention"], number), first)
            x = norm(x + mlp(x, block["mlp"]), second)
    x = norm(x, p["final_norm"]) if config.norm == "pre" else x
    logits = x @ (p["token_embedding"]["embedding"] if config.tied_head else p["head"]).T
    return logits if config.logit_cap is None else config.logit_cap * np.tanh(logits / config.logit_cap)


@pytest.mark.parametrize("change", CHANGES)
def test_the_model_is_that_of_the_papers(x64, change):
    config, tokens = small(change), np.array(random_tokens(1, 4, 16, 23))
    parameters = random_gpt(config)
    whole = logits_of(config, parameters, jnp.array(tokens))
    np.testing.assert_allclose(whole, by_the_formulas(config, parameters, tokens), atol=1e-9)


OTHER_PARAMETERS = ("untied", "sinusoidal", "blocked", "hidden", "rms", "rotary", "swiglu", "shared keys", "modern")


def test_every_option_has_an_effect(x64):
    """So that to be equal with an option is to be equal with that option."""
    logits = {}
    for change in CHANGES:
        if "bias" not in change and change not in OTHER_PARAMETERS:
            parameters = random_gpt(small("default"))
            if small(change).norm == "post":
                del parameters["final_norm"]
            logits[change] = np.array(logits_of(small(change), parameters, random_tokens(1, 4, 16, 23)))
    for one, other in itertools.combinations(logits, 2):
        assert np.abs(logits[one] - logits[other]).max() > 1e-5, (one, other)


@pytest.mark.parametrize("change", ["default", "post-norm, no bias", "untied", "unscaled, by layer", "modern"])
def test_the_layout_for_decoding_changes_no_value(x64, change):
    config, tokens = small(change), random_tokens(1, 4, 16, 23)
    stacked = random_gpt(config)
    laid_out = decoding_parameters(stacked)
    assert "blocks" not in laid_out and {"block_0", "block_1"} <= laid_out.keys()
    count = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (stacked, laid_out)]
    assert count[0] == count[1]
    apply = jax.jit(lambda parameters: GPT(config).apply({"params": parameters}, tokens)[0])
    np.testing.assert_allclose(apply(laid_out), apply(stacked), atol=1e-12)
    assert decoding_parameters(laid_out) is laid_out
    np.testing.assert_array_equal(output_head(laid_out), output_head(stacked))


def test_prefill_reads_either_layout(x64):
    config, tokens = small("default"), random_tokens(1, 2, 6, 23)
    parameters, counts = random_gpt(config), jnp.array([6, 2])
    run = jax.jit(lambda parameters: prefill(config, parameters, tokens, counts, 8))
    for ours, other in zip(*map(jax.tree.leaves, (run(parameters), run(decoding_parameters(parameters)))), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-12)


def test_a_cache_needs_the_layout_for_decoding():
    parameters = random_gpt(TINY)
    with pytest.raises(ValueError, match="must be laid out by decoding_parameters"):
        GPT(TINY).apply({"params": parameters}, random_tokens(0, 2, 4), cache=empty_cache(2, 8))


def test_what_the_cache_cannot_hold_is_refused():
    parameters = decoding_parameters(random_gpt(TINY))
    with pytest.raises(ValueError, match="9 tokens do not fit a context of 8"):
        GPT(TINY).apply({"params": parameters}, random_tokens(0, 2, 9), cache=empty_cache(2, 8))


@pytest.mark.parametrize(
    "change", [{}, {"bias": False, "tied_head": False}, {"remat": True}, {"norm": "post"}, CHANGES["modern"]]
)
def test_gradients_agree_with_finite_differences(x64, change):
    config = dataclasses.replace(small("default"), **change)
    parameters, tokens = jax.tree.map(np.array, random_gpt(config)), random_tokens(1, 2, 9, 23)
    both = jax.jit(jax.value_and_grad(lambda p: mean_loss(config, p, tokens)))
    gradients, random = jax.tree.map(np.array, both(parameters)[1]), np.random.default_rng(0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        direction = random.normal(size=leaf.shape)
        moved = [
            both(jax.tree_util.tree_map_with_path(lambda p, x: x + step * direction if p == path else x, parameters))[0]  # noqa: B023
            for step in (1e-5, -1e-5)
        ]
        expected = sum(
            np.vdot(gradient, direction) for p, gradient in jax.tree_util.tree_leaves_with_path(gradients) if p == path
        )
        np.testing.assert_allclose((moved[0] - moved[1]) / 2e-5, expected, rtol=1e-5, atol=1e-8, err_msg=str(path))


def test_ways_to_compute_do_not_change_the_result(x64):
    config = dataclasses.replace(small("default"), layers=3, dropout=0.2, unroll=3)
    parameters, tokens = random_gpt(config), random_tokens(1, 2, 12, 23)
    keys = jax.random.split(jax.random.key(2), 2)

    def run(**change):
        changed = dataclasses.replace(config, **change)
        return jax.jit(jax.value_and_grad(lambda p: mean_loss(changed, p, tokens, dropout_keys=keys)))(parameters)

    ours, other = run(), run(unroll=2, remat=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, other)


def test_options_change_the_parameters_they_name():
    def names(config):
        tree = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
        return {
            jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(tree)
        }

    default = names(TINY)
    assert not any("bias" in name for name in names(dataclasses.replace(TINY, bias=False)))
    assert names(dataclasses.replace(TINY, tied_head=False)) - default == {"head"}
    assert default - names(dataclasses.replace(TINY, positions="sinusoidal")) == {"position_embedding/embedding"}


@pytest.mark.parametrize("layers", [2, 8])
def test_initial_scales_are_gpt2s(layers):
    config = GPTConfig(vocab_size=100, context=32, layers=layers, heads=4, width=128, unroll=1)
    blocks = init_parameters(config, jax.random.key(0))["blocks"]
    for name, inner in [("attention", "qkv"), ("mlp", "up")]:
        np.testing.assert_allclose(blocks[name][inner]["kernel"].std(), 0.02, rtol=0.05)
    for name, inner in [("attention", "out"), ("mlp", "down")]:
        np.testing.assert_allclose(blocks[name][inner]["kernel"].std(), 0.02 / math.sqrt(2 * layers), rtol=0.05)
        assert not jnp.array_equal(blocks[name][inner]["kernel"][0], blocks[name][inner]["kernel"][1])


def test_dropout_is_the_rows_own():
    """A row loses the same activations whatever rows are beside it, and another row loses others."""
    plain = small("default", "float32")
    config = dataclasses.replace(plain, dropout=0.4)
    parameters = random_gpt(config)
    tokens = jnp.broadcast_to(random_tokens(1, 1, 16, 23), (4, 16))
    keys = jax.random.split(jax.random.key(2), 4)
    together = logits_of(config, parameters, tokens, dropout_keys=keys)
    alone = logits_of(config, parameters, tokens[2:3], dropout_keys=keys[2:3])
    np.testing.assert_allclose(together[2:3], alone, atol=1e-4)
    assert jnp.abs(together[0] - together[1]).max() > 0.01
    np.testing.assert_array_equal(logits_of(config, parameters, tokens)[0], logits_of(plain, parameters, tokens)[0])


def test_embeddings_and_attention_may_have_a_dropout_of_their_own():
    """Each of the two changes what comes out when it alone is on, and when it alone is off."""
    tokens, keys = random_tokens(1, 4, 16, 23), jax.random.split(jax.random.key(2), 4)
    config = small("default", "float32")
    parameters = random_gpt(config)

    def logits(**change):
        return np.array(logits_of(dataclasses.replace(config, **change), parameters, tokens, dropout_keys=keys))

    names = ("embedding_dropout", "attention_dropout")
    results = [logits(), logits(dropout=0.4)]
    results += [logits(**{name: 0.4}) for name in names]
    results += [logits(**{"dropout": 0.4, name: 0.0}) for name in names]
    assert all(np.abs(one - other).max() > 0.01 for one, other in itertools.combinations(results, 2))
    # With both off, all that is left is the residual branches'; without any keys, nothing.
    rest = {"dropout": 0.4} | dict.fromkeys(names, 0.0)
    assert np.abs(logits(**rest) - results[0]).max() > 0.01
    np.testing.assert_array_equal(logits_of(dataclasses.replace(config, dropout=0.4), parameters, tokens), results[0])


def test_half_precision_compute_keeps_float32_parameters():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    parameters = init_parameters(config, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(parameters)} == {"float32"}
    hidden, exact = (
        jax.jit(lambda p, c=c: GPT(c).apply({"params": p}, random_tokens(1, 2, 8))[0])(parameters)
        for c in (config, TINY)
    )
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.1)


def test_too_many_tokens_are_refused():
    parameters = random_gpt(TINY)
    with pytest.raises(ValueError, match="25 tokens do not fit a context of 24"):
        GPT(TINY).apply({"params": parameters}, random_tokens(0, 1, 25))


def test_an_id_outside_the_vocabulary_is_not_another_token():
    parameters = random_gpt(TINY)
    assert jnp.isnan(logits_of(TINY, parameters, jnp.array([[50]]))).all()


def test_with_zero_init_every_block_starts_as_the_identity():
    config = dataclasses.replace(TINY, zero_init=True)
    parameters = init_parameters(config, jax.random.key(0))
    for part, name in (("attention", "out"), ("mlp", "down")):
        assert not jnp.any(parameters["blocks"][part][name]["kernel"])
    fewer = jax.tree.map(lambda leaf: leaf[:1], parameters["blocks"])
    tokens = random_tokens(1, 2, 9)
    one = logits_of(dataclasses.replace(config, layers=1), {**parameters, "blocks": fewer}, tokens)
    np.testing.assert_array_equal(one, logits_of(config, parameters, tokens))
