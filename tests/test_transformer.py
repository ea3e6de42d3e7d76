"""The encoder-decoder: equal to PyTorch's, the same with a cache, padded or beside other beams, and causal."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt.config import TransformerConfig, transformer_size
from jaxgpt.models import transformer
from jaxgpt.models.losses import unembed
from jaxgpt.models.positions import sinusoidal_positions
from jaxgpt.models.transformer import Transformer, attention_map, decoding_parameters, init_parameters, output_head
from jaxgpt.tasks import translation
from jaxgpt.training.metrics import count_parameters

# Compiled whole: op by op, each op is compiled for each shape, which takes many times as long.
prefill = jax.jit(transformer.prefill, static_argnums=(0, 1, 5))
decode_step = jax.jit(transformer.decode_step, static_argnums=0)
sums = jax.jit(translation.sums, static_argnums=(0, 1))
map_of = jax.jit(attention_map, static_argnums=0)

SMOOTHING = 0.1
SMALL = TransformerConfig(
    vocab_size=23, context=24, heads=2, width=12, hidden=20, encoder_layers=2, decoder_layers=2, dropout=0.0, unroll=1
)
DOUBLE = dataclasses.replace(SMALL, parameter_dtype="float64", compute_dtype="float64")
FORMS = [{}, {"norm": "pre"}, {"positions": "learned", "bias": False}]


def random_parameters(config, seed=0):
    return drawn(functools.partial(init_parameters, config), seed, 0.3)


def random_batch(config, seed, rows=4, source=9, target=7):
    """Sentences of random lengths, in the form that `PairBatches` gives."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (3, rows, max(source, target)), np.int32)
    lengths = rng.integers(1, target + 1, rows)
    return {
        "source": jnp.array(tokens[0, :, :source]),
        "source_length": jnp.array(rng.integers(1, source + 1, rows), jnp.int32),
        "target": jnp.array(tokens[1, :, :target]),
        "targets": jnp.array(tokens[2, :, :target]),
        "weights": jnp.array(np.arange(target) < lengths[:, None], config.compute_dtype),
        "row": jnp.arange(rows, dtype=jnp.int32),
    }


def mask_of(batch):
    return jnp.arange(batch["source"].shape[1]) < batch["source_length"][:, None]


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(config, parameters, batch):
    return Transformer(config).apply({"params": parameters}, batch["source"], mask_of(batch), batch["target"])


class TorchTransformer:
    """`torch.nn.Transformer`'s encoder and decoder with our parameters; its gradients come back under our names."""

    def __init__(self, config, parameters):
        self.torch = torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch==2.13.0")
        self.config = config
        nn, last = torch.nn, config.norm == "pre"
        shape = (config.width, config.heads, config.hidden_width, 0.0, "relu")
        options = {"batch_first": True, "norm_first": last, "layer_norm_eps": config.norm_epsilon}
        self.model = nn.ModuleDict(
            {
                "encoder": nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(*shape, **options), config.encoder_layers,
                    norm=nn.LayerNorm(config.width) if last else None, enable_nested_tensor=False,
                ),
                "decoder": nn.TransformerDecoder(
                    nn.TransformerDecoderLayer(*shape, **options), config.decoder_layers,
                    norm=nn.LayerNorm(config.width) if last else None,
                ),
                "embedding": nn.Embedding(config.vocab_size, config.width),
            }
        )  # fmt: skip
        self.names = dict(self._names(parameters))
        own = dict(self.model.named_parameters())
        assert own.keys() == self.names.keys(), "every one of its parameters has a counterpart"
        with torch.no_grad():
            for name, (path, layer, part) in self.names.items():
                own[name].copy_(torch.tensor(np.array(self._of(parameters, path, layer, part))))

    def _names(self, parameters):
        """Its name -> (our path, layer, rows of the other side's fused matrix), once for each of its parameters."""
        yield "embedding.weight", (("token_embedding", "embedding"), None, None)
        for stack, layers in (("encoder", self.config.encoder_layers), ("decoder", self.config.decoder_layers)):
            norms = {"attention_norm": "norm1", "cross_norm": "norm2", "mlp_norm": "norm3"}
            if stack == "encoder":
                norms = {"attention_norm": "norm1", "mlp_norm": "norm2"}
            for layer in range(layers):
                at, blocks = f"{stack}.layers.{layer}", (stack, "blocks")
                pairs = {"attention/qkv": "self_attn.in_proj", "attention/out": "self_attn.out_proj."}
                pairs |= {"mlp/up": "linear1.", "mlp/down": "linear2."}
                if stack == "decoder":
                    pairs |= {"cross_attention/out": "multihead_attn.out_proj."}
                    for leaf, name in (("kernel", "weight"), ("bias", "bias")):
                        path = (*blocks, "cross_attention", leaf)
                        yield f"{at}.multihead_attn.in_proj_{name}", (path, layer, "fused")
                for ours, theirs in pairs.items():
                    join = "_" if theirs.endswith("proj") else ""
                    for leaf, name in (("kernel", "weight"), ("bias", "bias")):
                        yield f"{at}.{theirs}{join}{name}", ((*blocks, *ours.split("/"), leaf), layer, None)
                for ours, theirs in norms.items():
                    for leaf, name in (("scale", "weight"), ("bias", "bias")):
                        yield f"{at}.{theirs}.{name}", ((*blocks, ours, leaf), layer, None)
            if self.config.norm == "pre":
                for leaf, name in (("scale", "weight"), ("bias", "bias")):
                    yield f"{stack}.norm.{name}", ((stack, "final_norm", leaf), None, None)

    def _of(self, tree, path, layer, part):
        """Our value of one of its parameters."""
        *path, leaf = path
        if part == "fused":  # it keeps the projections of queries, keys and values of cross attention together
            both = [self._of(tree, (*path, name, leaf), layer, None) for name in ("query", "key_value")]
            return np.concatenate(both)
        for name in path:
            tree = tree[name]
        value = np.array(tree[leaf] if layer is None else tree[leaf][layer])
        return value.T if leaf == "kernel" else value

    def hidden(self, batch):
        torch, width = self.torch, self.config.width
        positions = torch.tensor(np.array(sinusoidal_positions(self.config.context, width)), dtype=torch.float32)

        def embed(tokens):
            tokens = torch.tensor(np.array(tokens), dtype=torch.long)
            return self.model["embedding"](tokens) * math.sqrt(width) + positions[: tokens.shape[1]]

        absent = ~torch.tensor(np.array(mask_of(batch)))
        memory = self.model["encoder"](embed(batch["source"]), src_key_padding_mask=absent)
        length = batch["target"].shape[1]
        later = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        return self.model["decoder"](embed(batch["target"]), memory, tgt_mask=later, memory_key_padding_mask=absent)

    def gradients(self, batch):
        """Of the label-smoothed loss, in our names: path with layer -> value, as ours is."""
        torch = self.torch
        logits = self.hidden(batch) @ self.model["embedding"].weight.T
        rule = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING, reduction="none")
        targets = torch.tensor(np.array(batch["targets"]), dtype=torch.long)
        (rule(logits.transpose(1, 2), targets) * torch.tensor(np.array(batch["weights"]))).sum().backward()
        return {name: parameter.grad.numpy() for name, parameter in self.model.named_parameters()}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_it_is_torchs_transformer(norm, seed):
    rng = np.random.default_rng(seed)
    heads, head_width = (int(n) for n in rng.integers(1, 4, 2))
    config = dataclasses.replace(
        SMALL, norm=norm, heads=heads, width=2 * heads * head_width, hidden=int(rng.integers(3, 30)),
        encoder_layers=int(rng.integers(1, 4)), decoder_layers=int(rng.integers(1, 4)),
    )  # fmt: skip
    parameters = random_parameters(config, seed)
    batch = random_batch(config, seed, *(int(n) for n in rng.integers(2, 12, 3)))
    peer = TorchTransformer(config, parameters)
    real = np.array(batch["weights"], bool)
    theirs = peer.hidden(batch).detach().numpy()
    np.testing.assert_allclose(hidden_states(config, parameters, batch)[real], theirs[real], atol=1e-5)
    ours = jax.jit(jax.grad(lambda p: translation.loss(config, SMOOTHING, p, batch, None)[0]))(parameters)
    for name, gradient in peer.gradients(batch).items():
        own = peer._of(ours, *peer.names[name])
        apart = np.linalg.norm(own - gradient) / max(np.linalg.norm(gradient), 1e-3)
        assert apart < 1e-4, f"{name}: {apart}"


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("base", "bound"), [(DOUBLE, 1e-10), (SMALL, 1e-5)], ids=["float64", "float32"])
def test_cached_decoding_is_full_decoding(request, base, bound, form):
    if base is DOUBLE:
        request.getfixturevalue("x64")
    config = dataclasses.replace(base, **form)
    parameters, batch = random_parameters(config), random_batch(config, 1)
    start = 5
    batch["target"] = batch["target"].at[:, 0].set(start)
    expected = unembed(hidden_states(config, parameters, batch), output_head(parameters))
    for laid_out in (parameters, decoding_parameters(parameters)):
        logits, cache = prefill(config, start, laid_out, batch["source"], batch["source_length"], 12)
        seen = [logits]
        for place in range(1, batch["target"].shape[1]):
            logits, cache = decode_step(config, laid_out, batch["target"][:, place : place + 1], cache)
            seen.append(logits[:, 0])
        np.testing.assert_allclose(np.stack(seen, axis=1), expected, atol=bound)


def test_beams_of_a_sentence_side_by_side_are_each_alone(x64):
    """The cache keeps what belongs to a sentence once, whatever rows continue it, and in whatever order."""
    parameters, batch = decoding_parameters(random_parameters(DOUBLE)), random_batch(DOUBLE, 2, rows=3)
    rng = np.random.default_rng(0)
    _, cache = prefill(DOUBLE, 5, parameters, batch["source"], batch["source_length"], 10)
    together = cache.take(jnp.repeat(jnp.arange(3), 4))  # four beams each
    first = rng.integers(0, 23, (12, 1), np.int32)
    _, together = decode_step(DOUBLE, parameters, jnp.array(first), together)
    chosen = np.concatenate([4 * group + rng.integers(0, 4, 4) for group in (2, 0)])  # one sentence has ended
    together = together.take(jnp.array(chosen), jnp.array([2, 0]))
    second = rng.integers(0, 23, (8, 1), np.int32)
    logits, _ = decode_step(DOUBLE, parameters, jnp.array(second), together)
    for row, past in enumerate(chosen):
        alone = cache.take(jnp.array([past // 4]), jnp.array([past // 4]))
        _, alone = decode_step(DOUBLE, parameters, jnp.array(first[past : past + 1]), alone)
        expected, _ = decode_step(DOUBLE, parameters, jnp.array(second[row : row + 1]), alone)
        np.testing.assert_allclose(logits[row], expected[0], atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("base", "bound"), [(DOUBLE, 1e-10), (SMALL, 1e-5)], ids=["float64", "float32"])
def test_padding_changes_nothing(request, base, bound, form):
    if base is DOUBLE:
        request.getfixturevalue("x64")
    config = dataclasses.replace(base, **form)
    parameters, batch = random_parameters(config), random_batch(config, 3)
    expected = hidden_states(config, parameters, batch)
    rng = np.random.default_rng(0)
    for more in (1, 6, 13):
        wider = dict(batch)
        for name in ("source", "target"):
            rest = rng.integers(0, config.vocab_size, (4, more), np.int32)
            wider[name] = jnp.concatenate([batch[name], rest], axis=1)
        found = hidden_states(config, parameters, wider)[:, : expected.shape[1]]
        np.testing.assert_allclose(found, expected, atol=bound)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_position_sees_a_later_one_or_padding(x64, form):
    """Exactly: the derivative by what must not be seen is 0."""
    config = dataclasses.replace(DOUBLE, **form)
    parameters, batch = random_parameters(config), random_batch(config, 4)
    model, place = Transformer(config), 3
    encode = jax.jit(functools.partial(model.apply, method="encode"))
    encoded = encode({"params": parameters}, batch["source"], mask_of(batch))

    def output(embedding, source):
        # Each place of the target is a token of its own, so the embedding's rows are the target's inputs.
        changed = {**parameters, "token_embedding": {"embedding": embedding}}
        target = jnp.arange(7)[None]
        hidden, _ = model.apply({"params": changed}, target, source[:1], mask_of(batch)[:1], method="decode")
        return jnp.sum(jnp.sin(hidden[0, place]))

    of_target, of_source = jax.jit(jax.grad(output, argnums=(0, 1)))(
        parameters["token_embedding"]["embedding"], encoded
    )
    seen = np.abs(of_target).sum(axis=1) > 0
    assert seen[: place + 1].all() and not seen[place + 1 :].any()
    real = np.array(mask_of(batch))[0]
    assert ((np.abs(of_source[0]).sum(axis=1) > 0) == real).all()


def test_gradients_are_finite_differences(x64):
    parameters, batch = random_parameters(DOUBLE), random_batch(DOUBLE, 5)

    def total(parameters):
        return translation.loss(DOUBLE, SMOOTHING, parameters, batch, None)[0]

    rng, step = np.random.default_rng(0), 1e-6
    total = jax.jit(total)
    gradients = jax.jit(jax.grad(total))(parameters)
    parameters, gradients = jax.tree.map(np.array, (parameters, gradients))
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), parameters)

    def moved(by):
        return total(jax.tree.map(lambda p, d: p + by * d, parameters, direction))

    expected = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))
    np.testing.assert_allclose((moved(step) - moved(-step)) / (2 * step), expected, rtol=1e-6)


def test_dropout_is_by_row_and_in_every_place(x64):
    """A row loses the same alone as beside others; each of the paper's places loses something."""
    config = dataclasses.replace(DOUBLE, dropout=0.4)
    parameters, batch = random_parameters(config), random_batch(config, 6)
    keys = jax.random.split(jax.random.key(0), 4)
    whole = sums(config, SMOOTHING, parameters, batch, keys)
    rows = [
        sums(config, SMOOTHING, parameters, {name: x[row : row + 1] for name, x in batch.items()}, keys[row : row + 1])
        for row in range(4)
    ]
    for together, apart in zip(whole, zip(*rows, strict=True), strict=True):
        np.testing.assert_allclose(together, sum(apart), rtol=1e-12)
    found = {float(sums(config, SMOOTHING, parameters, batch, k)[0]) for k in (None, keys, keys[::-1])}
    assert len(found) == 3
    embeddings_only = dataclasses.replace(config, dropout=0.0, embedding_dropout=0.4)
    weights_only = dataclasses.replace(config, dropout=0.0, attention_dropout=0.4)
    for other in (embeddings_only, weights_only):
        assert float(sums(other, SMOOTHING, parameters, batch, keys)[0]) not in found


def test_attention_is_shared_out_over_the_source(x64):
    parameters = random_parameters(DOUBLE)
    rng = np.random.default_rng(7)
    source, target = (jnp.array(rng.integers(0, 23, size)) for size in (5, 4))
    weights = map_of(DOUBLE, parameters, source, target)
    assert weights.shape == (2, 2, 4, 5)  # L N T S
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-12)
    longer = map_of(DOUBLE, parameters, source, jnp.concatenate([target, target]))
    np.testing.assert_allclose(longer[:, :, :4], weights, rtol=1e-10)


@pytest.mark.parametrize(("size", "layers", "width", "hidden"), [("base", 6, 512, 2048), ("big", 6, 1024, 4096)])
def test_the_published_sizes(size, layers, width, hidden):
    config = transformer_size(size, vocab_size=37_000)
    shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    attention, mlp, norm = 4 * width * (width + 1), 2 * width * hidden + width + hidden, 2 * width
    encoder = attention + mlp + 2 * norm
    decoder = 2 * attention + mlp + 3 * norm
    assert count_parameters(shapes) == 37_000 * width + layers * (encoder + decoder)
    millions = {"base": 65, "big": 213}[size]  # Vaswani et al. 2017, table 3
    assert count_parameters(shapes) / 1e6 == pytest.approx(millions, rel=0.04)


def test_it_starts_out_knowing_little():
    config = transformer_size("tiny", vocab_size=500, context=32, dropout=0.0)
    batch = random_batch(config, 8, rows=16, source=12, target=12)
    _, weight, nll = sums(config, SMOOTHING, init_parameters(config, jax.random.key(0)), batch)
    assert abs(nll / weight - math.log(500) - 0.5) < 0.3, "logits of unit variance cost half a nat"


def test_what_does_not_fit_is_refused():
    parameters = random_parameters(SMALL)
    batch = random_batch(SMALL, 9, source=25)
    with pytest.raises(ValueError, match="25 tokens do not fit a context of 24"):
        hidden_states(SMALL, parameters, batch)
    with pytest.raises(ValueError, match="there is no Transformer of size huge"):
        transformer_size("huge")
