"""config.json both ways, and the names of the tensors."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxgpt.config import GPTConfig
from jaxgpt.models.gpt import init_parameters
from jaxgpt.storage.huggingface import config_from_hf, config_to_hf, tensor_names

SMALL = GPTConfig(vocab_size=61, context=20, layers=3, heads=4, width=32)
# What is in the config.json of these models on the hub.
PUBLISHED = {
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    },
    "openai-gpt": {
        "afn": "gelu", "architectures": ["OpenAIGPTLMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "openai-gpt", "n_ctx": 512,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512, "n_special": 0,
        "predict_special_tokens": True, "resid_pdrop": 0.1, "summary_activation": None, "vocab_size": 40478,
    },
}  # fmt: skip


def read(kind="gpt2", **values):
    return config_from_hf({"model_type": kind} | values, where="folder/config.json")


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_models_and_the_defaults(kind):
    expected = {"gpt2": GPTConfig(vocab_size=50257, dropout=0.1)}
    expected["openai-gpt"] = GPTConfig(vocab_size=40478, context=512, dropout=0.1, norm="post")
    assert read(**PUBLISHED[kind], kind=kind) == read(kind) == expected[kind]


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"vocab_size": 61}, "vocab_size", 61),
        ({"n_positions": 20}, "context", 20),
        ({"n_ctx": 20}, "context", 20),
        ({"n_positions": 20, "n_ctx": 30}, "context", 20),
        ({"max_position_embeddings": 20}, "context", 20),
        ({"n_embd": 24}, "width", 24),
        ({"hidden_size": 24}, "width", 24),
        ({"num_hidden_layers": 3}, "layers", 3),
        ({"num_attention_heads": 4}, "heads", 4),
        ({"n_layer": 3}, "layers", 3),
        ({"n_head": 4}, "heads", 4),
        ({"n_inner": 40}, "hidden", 40),
        ({"n_inner": None}, "hidden", None),
        ({"activation_function": "gelu"}, "activation", "gelu"),
        ({"activation_function": "relu"}, "activation", "relu"),
        ({"activation_function": "tanh"}, "activation", "tanh"),
        ({"activation_function": "swish"}, "activation", "silu"),
        ({"activation_function": "silu"}, "activation", "silu"),
        ({"activation_function": "gelu_pytorch_tanh"}, "activation", "gelu_new"),
        ({"resid_pdrop": 0}, "dropout", 0.0),
        ({"embd_pdrop": 0.2}, "embedding_dropout", 0.2),
        ({"attn_pdrop": 0.2}, "attention_dropout", 0.2),
        ({"resid_pdrop": 0.2}, "attention_dropout", 0.1),
        ({"resid_pdrop": 0.2, "embd_pdrop": 0.2}, "embedding_dropout", None),
        ({"layer_norm_epsilon": 1e-3}, "norm_epsilon", 1e-3),
        ({"initializer_range": 0.5}, "init_std", 0.5),
        ({"scale_attn_weights": False}, "scale_attention", False),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attention_by_layer", True),
        ({"tie_word_embeddings": False}, "tied_head", False),
        ({"jaxgpt": {"bias": False}}, "bias", False),
    ],
    ids=str,
)
def test_every_field_is_honoured(values, field, value):
    assert getattr(read(**values), field) == value


def test_scores_are_float32_anyway():
    assert read(reorder_and_upcast_attn=True) == read()


@pytest.mark.parametrize(
    ("afn", "ours"),
    [("gelu", "gelu_new"), ("gelu_new", "gelu_new"), ("relu", "relu"), ("silu", "silu"), ("swish", "silu")],
)
def test_the_first_gpt_calls_the_tanh_form_gelu(afn, ours):
    assert read("openai-gpt", afn=afn).activation == ours


@pytest.mark.parametrize("key", ["n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"])
def test_what_the_first_gpt_does_not_know_means_nothing_there(key):
    assert read("openai-gpt", **{key: {"n_inner": 5}.get(key, key.endswith("idx"))}) == read("openai-gpt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "llama.*gpt2.*openai-gpt"),
        ({"model_type": None}, "None.*gpt2"),
        ({"model_type": ["gpt2"]}, "gpt2"),
        ({"activation_function": "mish"}, "activation_function.*mish.*gelu_new"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"activation_function": None}, "activation_function"),
        ({"model_type": "openai-gpt", "afn": "tanh"}, "afn.*tanh.*gelu"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_embd": "768"}, "n_embd.*'768'"),
        ({"n_embd": 768.0}, "n_embd"),
        ({"n_layer": True}, "n_layer"),
        ({"n_layer": None}, "n_layer"),
        ({"n_inner": "big"}, "n_inner"),
        ({"vocab_size": []}, "vocab_size"),
        ({"resid_pdrop": "0.1"}, "resid_pdrop"),
        ({"embd_pdrop": True}, "embd_pdrop"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon"),
        ({"initializer_range": 10**310}, "initializer_range"),
        ({"scale_attn_weights": 1}, "scale_attn_weights"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings"),
        ({"reorder_and_upcast_attn": "no"}, "reorder_and_upcast_attn"),
        ({"jaxgpt": 3}, "jaxgpt"),
        ({"jaxgpt": {"bias": "false"}}, "bias"),
        ({"n_head": 7}, "heads.*7"),
        ({"n_layer": 0}, "layers"),
        ({"resid_pdrop": 1.0}, "dropout"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_here_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=f"^folder/config.json.*{message}") as error:
        config_from_hf({"model_type": "gpt2"} | values, where="folder/config.json")
    assert "\n" not in str(error.value)


def random_config(seed):
    """A config that the format can express."""
    rng = np.random.default_rng(seed)

    def one(*values):
        return values[rng.integers(len(values))]

    post, heads = bool(seed % 2), one(1, 2, 4)
    dropout = one(0.0, 0.1)
    config = GPTConfig(
        vocab_size=one(3, 61), context=one(1, 20), layers=one(1, 3), heads=heads, width=heads * one(2, 8),
        dropout=dropout, embedding_dropout=one(None, 0.25), attention_dropout=one(None, 0.5), bias=one(True, False),
        activation=one("gelu_new", "relu", "silu"), norm="post" if post else "pre", norm_epsilon=one(1e-5, 1e-3),
        init_std=one(0.02, 0.1),
    )  # fmt: skip
    if post:
        return config
    return dataclasses.replace(
        config, hidden=one(None, 10), tied_head=one(True, False), activation=one("gelu_new", "gelu", "tanh", "silu"),
        scale_attention=one(True, False), scale_attention_by_layer=one(True, False),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_a_config_comes_back_from_json(seed):
    config = random_config(seed)
    values = json.loads(json.dumps(config_to_hf(config, 7)))
    assert config_from_hf(values, where="config.json") == config
    assert values["bos_token_id"] == values["eos_token_id"] == 7
    assert config_to_hf(config, None)["eos_token_id"] is None
    assert ("jaxgpt" in values) is not config.bias


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_transformers_is_told_what_to_build(norm):
    values = config_to_hf(dataclasses.replace(SMALL, norm=norm, parameter_dtype="bfloat16", dropout=0.1), 0)
    family = {"pre": ("gpt2", "GPT2LMHeadModel"), "post": ("openai-gpt", "OpenAIGPTLMHeadModel")}[norm]
    assert (values["model_type"], *values["architectures"]) == family
    assert values["dtype"] == "bfloat16" and values["embd_pdrop"] == values["attn_pdrop"] == 0.1
    assert ("activation_function" in values) is (norm == "pre") and ("afn" in values) is (norm == "post")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"positions": "sinusoidal"}, "model.positions.*sinusoidal"),
        ({"positions": "rotary"}, "model.positions.*rotary"),
        ({"normalizer": "rms"}, "model.normalizer.*rms"),
        ({"qk_norm": True}, "model.qk-norm"),
        ({"kv_heads": 2}, "model.kv-heads"),
        ({"window": 5}, "model.window"),
        ({"scale_embeddings": True}, "model.scale-embeddings"),
        ({"logit_cap": 30.0}, "model.logit-cap"),
        ({"activation": "swiglu"}, "model.activation.*swiglu"),
        ({"norm": "post", "positions": "sinusoidal"}, "model.positions"),
        ({"norm": "post", "hidden": 40}, "model.hidden"),
        ({"norm": "post", "tied_head": False}, "model.tied-head"),
        ({"norm": "post", "activation": "gelu"}, "model.activation.*gelu"),
        ({"norm": "post", "activation": "tanh"}, "model.activation.*tanh"),
        ({"norm": "post", "scale_attention": False}, "model.scale-attention "),
        ({"norm": "post", "scale_attention_by_layer": True}, "model.scale-attention-by-layer"),
    ],
    ids=str,
)
def test_what_the_format_cannot_express_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        config_to_hf(dataclasses.replace(SMALL, **changes), 0)


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"model\.vocab-size"):
        config_to_hf(dataclasses.replace(SMALL, vocab_size=None), 0)


def test_the_first_gpt_may_spell_out_its_hidden_width():
    config = dataclasses.replace(SMALL, norm="post", hidden=4 * SMALL.width)
    assert config_from_hf(config_to_hf(config, 0), where="").hidden_width == config.hidden_width


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied_head", [True, False])
def test_every_leaf_of_the_model_has_its_tensors(norm, bias, tied_head):
    config = dataclasses.replace(SMALL, norm=norm, bias=bias, tied_head=tied_head)
    tree = jax.eval_shape(functools.partial(init_parameters, config), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    names = tensor_names(config)
    assert names.keys() == shapes.keys()
    for path, name in names.items():
        assert isinstance(name, tuple) is path.startswith("blocks/")
        if isinstance(name, tuple):
            assert len(name) == shapes[path][0] == config.layers
    flat = [one for name in names.values() for one in ([name] if isinstance(name, str) else name)]
    assert len(flat) == len(set(flat))


def test_norms_after_the_sublayers_go_by_their_order():
    for norm in ("pre", "post"):
        names = tensor_names(dataclasses.replace(SMALL, norm=norm))
        assert names["blocks/attention_norm/scale"][1] == "h.1.ln_1.weight"
        assert names["blocks/mlp_norm/bias"][2] == "h.2.ln_2.bias"
        assert ("final_norm/scale" in names) is (norm == "pre")
    assert names["token_embedding/embedding"] == "tokens_embed.weight"
    assert names["position_embedding/embedding"] == "positions_embed.weight"
