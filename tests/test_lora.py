"""Low-rank adapters: nothing at first, the same attached as folded in, and the same losses as PEFT's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt.config import AdaptConfig, GPTConfig, OptimizerConfig, TrainConfig
from jaxgpt.models.gpt import GPT, init_parameters, output_head
from jaxgpt.models.lora import ADAPTER, PLACES, attach, fold, init_adapter
from jaxgpt.models.losses import unembed
from jaxgpt.models.partition import combine, separate
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.weights import export_tensors
from jaxgpt.tasks import lm
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.step import TrainState, train_step

MODEL = GPTConfig(vocab_size=23, context=16, layers=2, heads=2, width=12, hidden=20, init_std=0.3, unroll=1)
ADAPT = AdaptConfig("lora", rank=3, alpha=5.0, targets=("qkv", "out", "up", "down"))


@functools.partial(jax.jit, static_argnums=0)
def logits(config, parameters, tokens):
    hidden, _ = GPT(config).apply({"params": parameters}, tokens)
    return unembed(hidden, output_head(parameters))


def with_adapter(config, seed=0, *, trained=True):
    parameters = drawn(functools.partial(init_parameters, config), seed, 0.3)
    adapter = jax.jit(functools.partial(init_adapter, config, ADAPT))(jax.random.key(seed + 1))
    if trained:  # B is no longer zero
        rng = np.random.default_rng(seed)
        adapter = jax.tree.map(lambda x: jnp.array(0.3 * rng.normal(size=x.shape), x.dtype), adapter)
    return {**parameters, ADAPTER: adapter}


def tokens(seed, rows=3, length=9):
    return jnp.array(np.random.default_rng(seed).integers(0, 23, (rows, length)), jnp.int32)


def test_it_begins_as_nothing():
    """Bit for bit."""
    parameters = with_adapter(MODEL, trained=False)
    base = {name: leaf for name, leaf in parameters.items() if name != ADAPTER}
    plain = logits(MODEL, base, tokens(0))
    np.testing.assert_array_equal(logits(MODEL, attach(parameters, ADAPT), tokens(0)), plain)
    np.testing.assert_array_equal(logits(MODEL, fold(parameters, ADAPT), tokens(0)), plain)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
def test_folded_in_it_computes_the_same(x64, dtype, bound):
    config = dataclasses.replace(MODEL, parameter_dtype=dtype, compute_dtype=dtype)
    parameters = with_adapter(config, 2)
    attached, folded = (logits(config, form(parameters, ADAPT), tokens(1)) for form in (attach, fold))
    np.testing.assert_allclose(attached, folded, atol=bound)
    plain = logits(config, fold(with_adapter(config, 2, trained=False), ADAPT), tokens(1))
    assert np.abs(folded - plain).max() > 0.01, "the adapter says something"


def test_it_is_the_formula(x64):
    config = dataclasses.replace(MODEL, parameter_dtype="float64", compute_dtype="float64")
    parameters = with_adapter(config, 3)
    folded = by_path(fold(parameters, ADAPT))
    for part, name in PLACES.values():
        a, b = (np.array(parameters[ADAPTER]["blocks"][part][name][leaf]) for leaf in ("lora_a", "lora_b"))
        kernel = np.array(parameters["blocks"][part][name]["kernel"])
        expected = [kernel[layer] + 5.0 / 3.0 * a[layer] @ b[layer] for layer in range(2)]
        np.testing.assert_allclose(folded[f"blocks/{part}/{name}/kernel"], expected, rtol=1e-6)


def test_only_the_chosen_matrices_are_adapted():
    adapt = AdaptConfig("lora", targets=("out", "down"))
    adapter = init_adapter(MODEL, adapt, jax.random.key(0))
    assert set(by_path(adapter)) == {
        f"blocks/{place}/{leaf}" for place in ("attention/out", "mlp/down") for leaf in ("lora_a", "lora_b")
    }
    parameters = drawn(functools.partial(init_parameters, MODEL))
    assert attach(parameters, adapt) is parameters is fold(parameters, adapt), (
        "without an adapter there is nothing to do"
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_the_first_losses_are_those_of_peft():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    adapt = AdaptConfig("lora", rank=3, alpha=5.0, targets=("qkv",))
    config = TrainConfig(model=MODEL, adapt=adapt, init_from="base")
    parameters = {**init_parameters(MODEL, jax.random.key(0)), ADAPTER: init_adapter(MODEL, adapt, jax.random.key(1))}

    shape = {"vocab_size": 23, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_inner": 20}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    base = {name: leaf for name, leaf in parameters.items() if name != ADAPTER}
    own = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in export_tensors(MODEL, by_path(base)).items():
            own[name].copy_(torch.tensor(np.array(value)))
    lora = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True)
    theirs = peft.get_peft_model(theirs, lora)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    leaves = parameters[ADAPTER]["blocks"]["attention"]["qkv"]
    with torch.no_grad():
        for layer in range(2):
            for side, leaf in (("A", "lora_a"), ("B", "lora_b")):
                name = f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{side}.default.weight"
                trained.pop(name).copy_(torch.tensor(np.array(leaves[leaf][layer].T)))
    assert not trained, "each of its parameters has a counterpart"

    settings = OptimizerConfig(
        learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=None
    )
    optimizer = make_optimizer(settings, 5)
    chosen, frozen = separate(parameters, adapt)
    state = TrainState(jnp.int32(0), chosen, optimizer.init(chosen), frozen)
    loss = functools.partial(lm.loss, config.model, adapt)
    step = jax.jit(functools.partial(train_step, loss=loss, optimizer=optimizer, seed=0))
    torch_optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
    )
    for number in range(5):
        read = tokens(number, 4, 12)
        batch = {"tokens": read[:, :-1], "targets": read[:, 1:], "weights": jnp.ones((4, 11)), "row": jnp.arange(4)}
        state, metrics = step(state, batch, jnp.float32(number))
        ids = torch.tensor(np.array(read), dtype=torch.long)
        torch_optimizer.zero_grad()
        expected = theirs(ids, labels=ids).loss
        expected.backward()
        torch_optimizer.step()
        np.testing.assert_allclose(float(metrics["loss"]), float(expected.detach()), atol=1e-4)
    moved = np.abs(np.array(combine(state.parameters, state.frozen)[ADAPTER]["blocks"]["attention"]["qkv"]["lora_b"]))
    assert moved.max() > 1e-3
