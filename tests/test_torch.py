"""Our GPT is PyTorch's GPT-2: the same logits, gradients and AdamW steps from the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.config import GPTConfig, OptimizerConfig
from jaxgpt.models.gpt import GPT, output_head
from jaxgpt.models.losses import cross_entropy, unembed
from jaxgpt.training.optimizer import make_optimizer

torch = pytest.importorskip("torch", reason="needs torch, which only the comparison with PyTorch installs")
transformers = pytest.importorskip("transformers", reason="needs transformers, which only that comparison installs")

CONFIG = GPTConfig(vocab_size=61, context=20, layers=3, heads=4, width=32)
# (our path, transformers' name): kernels lie (in, out) in both, so nothing is transposed.
BLOCK_NAMES = {
    ("attention_norm", "scale"): "ln_1.weight",
    ("attention_norm", "bias"): "ln_1.bias",
    ("attention", "qkv", "kernel"): "attn.c_attn.weight",
    ("attention", "qkv", "bias"): "attn.c_attn.bias",
    ("attention", "out", "kernel"): "attn.c_proj.weight",
    ("attention", "out", "bias"): "attn.c_proj.bias",
    ("mlp_norm", "scale"): "ln_2.weight",
    ("mlp_norm", "bias"): "ln_2.bias",
    ("mlp", "up", "kernel"): "mlp.c_fc.weight",
    ("mlp", "up", "bias"): "mlp.c_fc.bias",
    ("mlp", "down", "kernel"): "mlp.c_proj.weight",
    ("mlp", "down", "bias"): "mlp.c_proj.bias",
}


def torch_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=CONFIG.vocab_size,
        n_positions=CONFIG.context,
        n_embd=CONFIG.width,
        n_layer=CONFIG.layers,
        n_head=CONFIG.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: at zero and one they would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def as_ours(tensor_of):
    """Our parameter tree from a function of transformers' parameter names."""

    def get(name):
        return jnp.asarray(tensor_of("transformer." + name).detach().numpy().copy())

    blocks = {}
    for path, name in BLOCK_NAMES.items():
        at = blocks
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = jnp.stack([get(f"h.{layer}.{name}") for layer in range(CONFIG.layers)])
    return {
        "token_embedding": {"embedding": get("wte.weight")},
        "position_embedding": {"embedding": get("wpe.weight")},
        "blocks": blocks,
        "final_norm": {"scale": get("ln_f.weight"), "bias": get("ln_f.bias")},
    }


def logits_of(parameters, tokens):
    hidden, _ = GPT(CONFIG).apply({"params": parameters}, tokens)
    return unembed(hidden, output_head(parameters))


@jax.jit
def mean_loss(parameters, tokens):
    total, weight = cross_entropy(
        logits_of(parameters, tokens)[:, :-1], tokens[:, 1:], jnp.ones_like(tokens[:, 1:], float)
    )
    return total / weight


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 17))


def assert_close_by_norm(ours, theirs, bound):
    def check(path, a, b):
        difference = np.linalg.norm(np.asarray(a) - b) / max(np.linalg.norm(b), 1e-6)
        assert difference <= bound, f"{jax.tree_util.keystr(path)}: {difference}"

    # The key bias shifts all scores of a query alike: its gradient is zero but for rounding.
    without_key_bias = [tree | {} for tree in (ours, theirs)]
    for tree in without_key_bias:
        bias = np.array(tree["blocks"]["attention"]["qkv"]["bias"])
        bias[:, CONFIG.width : 2 * CONFIG.width] = 0
        attention = tree["blocks"]["attention"]
        tree["blocks"] = tree["blocks"] | {"attention": attention | {"qkv": attention["qkv"] | {"bias": bias}}}
    jax.tree_util.tree_map_with_path(check, *without_key_bias)


def test_logits_equal(tokens):
    model = torch_model().eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = logits_of(as_ours(model.get_parameter), jnp.asarray(tokens))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_loss_and_gradients_equal(tokens):
    model = torch_model()
    loss = model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    loss.backward()
    ours, gradients = jax.value_and_grad(mean_loss)(as_ours(model.get_parameter), jnp.asarray(tokens))
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    assert_close_by_norm(gradients, as_ours(lambda name: model.get_parameter(name).grad), 1e-4)


def test_adamw_steps_equal(tokens):
    """Three steps with clipping, decay on matrices only, and warm-up: the same parameters after."""
    model = torch_model()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-6)
    settings = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=4, clip_norm=0.5, epsilon=1e-6)
    optimizer = make_optimizer(settings, steps=10)
    parameters = as_ours(model.get_parameter)
    state = optimizer.init(parameters)
    for step in range(1, 4):
        for group in theirs.param_groups:
            group["lr"] = 1e-3 * step / 4
        theirs.zero_grad()
        model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        theirs.step()
        gradients = jax.grad(mean_loss)(parameters, jnp.asarray(tokens))
        updates, state = optimizer.update(gradients, state, parameters, position=jnp.float32(step))
        parameters = optax.apply_updates(parameters, updates)
    assert_close_by_norm(parameters, as_ours(model.get_parameter), 1e-4)
