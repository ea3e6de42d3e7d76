"""Config fields and tensor names: what goes out comes back, and what has no counterpart is refused by name."""

import numpy as np
import pytest

from jaxgpt.config import GPTConfig
from jaxgpt.storage.huggingface import DEFAULTS, config_from_hf, config_to_hf, tensor_names


def random_config(seed):
    """Any model that the format can express."""
    rng = np.random.default_rng(seed)
    first = bool(seed % 4 == 3)
    heads = int(rng.integers(1, 4))
    width = heads * int(rng.integers(1, 6))
    return GPTConfig(
        vocab_size=int(rng.integers(1, 50)),
        context=int(rng.integers(1, 50)),
        layers=int(rng.integers(1, 4)),
        heads=heads,
        width=width,
        hidden=None if first or rng.random() < 0.5 else int(rng.integers(1, 30)),
        dropout=0.25,
        embedding_dropout=None if rng.random() < 0.5 else 0.5,
        attention_dropout=None if rng.random() < 0.5 else 0.125,
        bias=bool(rng.random() < 0.5),
        tied_head=first or bool(rng.random() < 0.5),
        activation=str(rng.choice(["gelu_new", "relu", "silu", *([] if first else ["gelu", "tanh"])])),
        norm="post" if first else "pre",
        scale_attention=first or bool(rng.random() < 0.5),
        scale_attention_by_layer=not first and bool(rng.random() < 0.5),
        norm_epsilon=float(rng.choice([1e-5, 1e-3])),
        init_std=float(rng.choice([0.02, 0.5])),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_a_config_comes_back(seed):
    config = random_config(seed)
    assert config_from_hf(config_to_hf(config, 7), "config.json") == config


def test_the_published_defaults_are_gpt2():
    config = config_from_hf({"model_type": "gpt2"}, "config.json")
    assert config == GPTConfig(vocab_size=50257, dropout=0.1)
    first = config_from_hf({"model_type": "openai-gpt", "afn": "gelu"}, "config.json")
    assert first == GPTConfig(vocab_size=40478, context=512, dropout=0.1, norm="post")
    assert config_from_hf({"model_type": "gpt2", "n_ctx": 77}, "config.json").context == 77


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "a model of type None; there are gpt2 and openai-gpt"),
        ({"model_type": "llama"}, "a model of type 'llama'"),
        ({"model_type": "gpt2", "activation_function": "mish"}, "activation_function is 'mish'; there are relu, silu"),
        ({"model_type": "openai-gpt", "afn": "tanh"}, "afn is 'tanh'"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention is true"),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 3}, "model.heads is 3, which does not divide"),
        ({"model_type": "gpt2", "jaxgpt": 3}, "jaxgpt is 3"),
    ]
    + [({"model_type": "gpt2", name: "x"}, f"{name} is 'x'") for name in DEFAULTS]
    + [
        ({"model_type": "gpt2", "n_layer": True}, "n_layer is True"),
        ({"model_type": "gpt2", "n_inner": 1.5}, "n_inner"),
    ],
)
def test_what_is_not_here_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message) as raised:
        config_from_hf(values, "folder/config.json")
    assert str(raised.value).startswith("folder/config.json")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"positions": "sinusoidal"}, "model.positions is sinusoidal"),
        ({"norm": "post", "hidden": 9}, "model.hidden is 9 with model.norm post"),
        ({"norm": "post", "tied_head": False}, "model.tied-head"),
        ({"norm": "post", "scale_attention": False}, "model.scale-attention is"),
        ({"norm": "post", "scale_attention_by_layer": True}, "model.scale-attention-by-layer"),
        ({"norm": "post", "activation": "gelu"}, "model.activation is gelu"),
    ],
)
def test_what_the_format_cannot_express_is_refused_by_name(changes, name):
    with pytest.raises(ValueError, match=f"^{name}.*cannot express"):
        config_to_hf(GPTConfig(vocab_size=5, width=12, heads=2, layers=1, **changes), None)


@pytest.mark.parametrize("seed", range(8))
def test_each_tensor_has_one_name(seed):
    config = random_config(seed)
    names = [name for own in tensor_names(config).values() for name in ((own,) if isinstance(own, str) else own)]
    assert len(set(names)) == len(names)
    assert any(name.endswith("bias") for name in names) == config.bias
    assert ("lm_head.weight" in names) == (not config.tied_head)
