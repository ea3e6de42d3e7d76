"""GPT-2 and the first GPT as `transformers` describes them: config fields and tensor names, both ways. No arrays.

What it has no field for, and a reader needs, stands under `jaxgpt` in config.json.
"""

from __future__ import annotations

from typing import Any

from jaxgpt.config import FinetuneConfig, GPTConfig, from_dict, require, to_dict

# Their spellings of an activation -> ours. In the first GPT "gelu" means the tanh form.
GPT2_ACTIVATIONS = {name: name for name in ("relu", "silu", "gelu", "tanh", "gelu_new")}
GPT2_ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}
FIRST_ACTIVATIONS = {"gelu": "gelu_new", "gelu_new": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}

# Our leaf -> transformers' name. Kernels lie (in, out) in both, so nothing is transposed.
BLOCK_NAMES = {
    "attention_norm/scale": "ln_1.weight",
    "attention_norm/bias": "ln_1.bias",
    "attention/qkv/kernel": "attn.c_attn.weight",
    "attention/qkv/bias": "attn.c_attn.bias",
    "attention/out/kernel": "attn.c_proj.weight",
    "attention/out/bias": "attn.c_proj.bias",
    "mlp_norm/scale": "ln_2.weight",
    "mlp_norm/bias": "ln_2.bias",
    "mlp/up/kernel": "mlp.c_fc.weight",
    "mlp/up/bias": "mlp.c_fc.bias",
    "mlp/down/kernel": "mlp.c_proj.weight",
    "mlp/down/bias": "mlp.c_proj.bias",
}
HEAD = "lm_head.weight"
SCORE = "score.weight"  # of a classifier (C, D)
# What transformers assumes where config.json does not say; their names of the fields.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
# Other names that transformers reads, or once wrote, for the same fields.
ALIASES = {"n_ctx": "n_positions", "max_position_embeddings": "n_positions", "hidden_size": "n_embd"}
ALIASES |= {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
FIRST_DEFAULTS = DEFAULTS | {"vocab_size": 40478, "n_positions": 512}


def config_from_hf(values: dict[str, Any], where: str) -> GPTConfig:
    """Read the fields of a config.json.

    `reorder_and_upcast_attn` asks for attention scores in float32, which ours are at least. `summary_*` and the like
    describe heads for other tasks, and token ids are the tokenizer's and the generation config's business.

    Args:
        values: what config.json holds.
        where: its path, for messages.

    Raises:
        ValueError: another architecture, or a field with a value that is not here; named.
    """
    kind = values.get("model_type")
    require(
        kind in ("gpt2", "openai-gpt"),
        f"{where} describes a model of type {kind!r}; there are gpt2 and openai-gpt",
    )
    first = kind == "openai-gpt"
    defaults = FIRST_DEFAULTS if first else DEFAULTS
    aliased = {name: values[other] for other, name in ALIASES.items() if other in values}
    fields = defaults | aliased | values
    for name, default in DEFAULTS.items():
        value = fields[name]
        number = isinstance(default, float)
        kinds = (int, type(None)) if name == "n_inner" else (float, int) if number else type(default)
        fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
        # JSON's numbers know no bounds, and Python's reader takes Infinity and NaN.
        fits = fits and (not number or abs(value) < 1e300)
        require(fits, f"{where}: {name} is {value!r}, which is not of the type it should have")
    require(not fields["add_cross_attention"], f"{where}: add_cross_attention is true, and a GPT here has none")
    name, known = ("afn", FIRST_ACTIVATIONS) if first else ("activation_function", GPT2_ACTIVATIONS)
    activation = fields.get(name, "gelu" if first else "gelu_new")
    here = isinstance(activation, str) and activation in known
    require(here, f"{where}: {name} is {activation!r}; there are {', '.join(known)}")
    dropout = float(fields["resid_pdrop"])
    own = {key: None if fields[key] == dropout else float(fields[key]) for key in ("embd_pdrop", "attn_pdrop")}
    described = fields.get("jaxgpt", {})
    bias = described.get("bias", True) if isinstance(described, dict) else None
    require(isinstance(bias, bool), f"{where}: jaxgpt is {described!r}; its bias must be true or false")
    if first:
        fields |= {"n_inner": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    try:
        return GPTConfig(
            vocab_size=fields["vocab_size"],
            context=fields["n_positions"],
            layers=fields["n_layer"],
            heads=fields["n_head"],
            width=fields["n_embd"],
            hidden=fields["n_inner"],
            dropout=dropout,
            embedding_dropout=own["embd_pdrop"],
            attention_dropout=own["attn_pdrop"],
            bias=bool(bias),
            tied_head=fields["tie_word_embeddings"],
            activation=known[activation],  # type: ignore[arg-type]
            norm="post" if first else "pre",
            scale_attention=fields["scale_attn_weights"],
            scale_attention_by_layer=fields["scale_attn_by_inverse_layer_idx"],
            norm_epsilon=float(fields["layer_norm_epsilon"]),
            init_std=float(fields["initializer_range"]),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def config_to_hf(config: GPTConfig, end_of_text: int | None) -> dict[str, Any]:
    """The config.json of a model, for `transformers`.

    Raises:
        ValueError: a setting that the format cannot express; named.
    """
    first = config.norm == "post"
    _refuse(config.positions != "learned", "model.positions", config.positions)
    _refuse(config.vocab_size is None, "model.vocab-size", None)
    for name in ("normalizer", "qk_norm", "kv_heads", "window", "scale_embeddings", "logit_cap"):
        value = getattr(config, name)
        _refuse(value != getattr(GPTConfig(), name), f"model.{name.replace('_', '-')}", value)
    _refuse(config.activation in ("relu-squared", "swiglu"), "model.activation", config.activation)
    if first:
        _refuse(config.hidden_width != 4 * config.width, "model.hidden", config.hidden, "with model.norm post")
        _refuse(not config.tied_head, "model.tied-head", False, "with model.norm post")
        _refuse(not config.scale_attention, "model.scale-attention", False, "with model.norm post")
        _refuse(config.scale_attention_by_layer, "model.scale-attention-by-layer", True, "with model.norm post")
        known = {ours: theirs for theirs, ours in reversed(FIRST_ACTIVATIONS.items())}
        _refuse(config.activation not in known, "model.activation", config.activation, "with model.norm post")
        own: dict[str, Any] = {"afn": known.get(config.activation)}
    else:
        own = {
            "activation_function": config.activation,
            "n_inner": config.hidden,
            "scale_attn_weights": config.scale_attention,
            "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
            "use_cache": True,
        }
    values = {
        "model_type": "openai-gpt" if first else "gpt2",
        "architectures": ["OpenAIGPTLMHeadModel" if first else "GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout if config.embedding_dropout is None else config.embedding_dropout,
        "attn_pdrop": config.dropout if config.attention_dropout is None else config.attention_dropout,
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": config.parameter_dtype,
    }
    return values | own | ({} if config.bias else {"jaxgpt": {"bias": False}})


def classifier_to_hf(config: FinetuneConfig, end_of_text: int | None) -> dict[str, Any]:
    """The config.json of a GPT with a task head, for the sequence classification of `transformers`.

    Raises:
        ValueError: a task or a setting that the format cannot express; named.
    """
    both, each = "(both orders of two texts, added up)", "(a score for each answer)"
    _refuse(config.task == "similarity", "task", config.task, both)
    _refuse(config.task == "multiple-choice", "task", config.task, each)
    values = config_to_hf(config.model, end_of_text)
    names = ("score",) if config.regression else config.labels
    own = {"task": config.task, "max_length": config.data.max_length}
    scores = {"score_range": list(config.labels)} if config.regression else {}
    return values | {
        "architectures": [values["architectures"][0].replace("LMHeadModel", "ForSequenceClassification")],
        "problem_type": "regression" if config.regression else "single_label_classification",
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "jaxgpt": values.get("jaxgpt", {}) | own | scores,
    }


def classifier_from_hf(values: dict[str, Any], where: str) -> FinetuneConfig | None:
    """Read what `classifier_to_hf` wrote; None if it is the config.json of another model.

    Raises:
        ValueError: a value that is not what it should be; named.
    """
    own = values.get("jaxgpt")
    if not isinstance(own, dict) or "task" not in own:
        return None
    model, scores, names = config_from_hf(values, where), own.get("score_range"), values.get("id2label")
    require(isinstance(names, dict), f"{where}: id2label is {names!r}; it must give each class its name")
    assert names is not None
    labels = [names.get(str(number)) for number in range(len(names))] if scores is None else scores
    fields = {"model": to_dict(model), "task": own["task"], "regression": scores is not None, "labels": labels}
    try:
        return from_dict(FinetuneConfig, fields | {"data": {"max_length": own.get("max_length")}})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _refuse(cannot: bool, name: str, value: object, why: str = "") -> None:
    require(not cannot, f"{name} is {value}{' ' * bool(why)}{why}, which the format of transformers cannot express")


def tensor_names(config: GPTConfig) -> dict[str, str | tuple[str, ...]]:
    """Our leaves and their names in transformers, without the `transformer.` prefix that files may have.

    A leaf of the stacked blocks has a name for each layer.
    """
    post = config.norm == "post"
    names: dict[str, str | tuple[str, ...]] = {
        "token_embedding/embedding": "tokens_embed.weight" if post else "wte.weight",
        "position_embedding/embedding": "positions_embed.weight" if post else "wpe.weight",
    }
    for leaf, name in BLOCK_NAMES.items():
        names[f"blocks/{leaf}"] = tuple(f"h.{layer}.{name}" for layer in range(config.layers))
    if not post:
        names |= {"final_norm/scale": "ln_f.weight", "final_norm/bias": "ln_f.bias"}
    if not config.bias:
        names = {leaf: name for leaf, name in names.items() if not leaf.endswith("/bias")}
    return names if config.tied_head else names | {"head": HEAD}
