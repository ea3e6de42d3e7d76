"""Configs: JSON both ways without loss, and every bad value is refused in a sentence that names its flag."""

import dataclasses
import json

import pytest

from jaxgpt.config import (
    AdaptConfig,
    ChatConfig,
    ConversationsConfig,
    DataConfig,
    ExamplesConfig,
    FinetuneConfig,
    GenerationConfig,
    GPTConfig,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    TrainConfig,
    TransformerConfig,
    TranslationConfig,
    flatten,
    from_dict,
    gpt_size,
    suggestion,
    to_dict,
    transformer_size,
)
from jaxgpt.config.devices import HostsConfig
from jaxgpt.recipes import RECIPES, recipe

UNUSUAL = TrainConfig(
    model=GPTConfig(
        vocab_size=300, context=32, layers=3, heads=2, width=8, hidden=24, dropout=0.5, bias=False, tied_head=False,
        positions="sinusoidal", norm_epsilon=1e-6, init_std=0.1, parameter_dtype="float64", compute_dtype="bfloat16",
        attention="blocked", remat=True, unroll=2, embedding_dropout=0.25, attention_dropout=0.125, activation="relu",
        norm="post", scale_attention=False, scale_attention_by_layer=True, kv_heads=1, normalizer="rms", qk_norm=True,
        zero_init=True, scale_embeddings=True, window=5, logit_cap=2.5,
    ),
    data=DataConfig(
        path=("a", "b"), text_field="body", tokenizer="byte", vocab_size=512, unknown="token", held_out=0.25,
        batch_size=8, sequence_length=16, cache="c",
    ),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=0.5, final_learning_rate=0.25, muon_learning_rate=0.125, muon_beta=0.25,
        schedule="wsd", warmup_steps=3, decay_share=0.5, beta1=0.5, beta2=0.5, epsilon=0.5, weight_decay=0.5,
        clip_norm=None, warmup_share=0.25, layer_decay=0.5, skip_spikes=5.0, max_skipped=3,
    ),
    parallel=ParallelConfig(strategy="mesh", devices=2, mesh="fsdp=2", gradient_accumulation=2, virtual_shards=4),
    steps=7, seed=8, out="o", resume="latest", max_seconds=9.5, eval_interval=10, checkpoint_interval=11, average=3,
    patience=4, log_interval=12, sample_tokens=13, sample_prompt="p", quiet=True, tensorboard=True, init_from="base",
    adapt=AdaptConfig("lora", 2, 3, 0.5, ("up", "down")), keep=5, watchdog_seconds=60.5,
    distributed="off", hosts=HostsConfig("host:1", 3, 1, 17, 18),
)  # fmt: skip
UNUSUAL_TRANSLATION = TranslationConfig(
    model=TransformerConfig(
        encoder_layers=2, decoder_layers=3, init_std=0.1,
        **{key: value for key, value in vars(UNUSUAL.model).items() if key in
           {"vocab_size", "context", "heads", "width", "hidden", "dropout", "bias", "norm_epsilon", "parameter_dtype",
            "compute_dtype", "attention", "remat", "unroll", "embedding_dropout", "attention_dropout",
            "scale_attention", "scale_attention_by_layer", "kv_heads", "normalizer", "qk_norm", "zero_init"}},
        positions="learned", activation="gelu", norm="pre",
    ),
    data=PairsConfig(
        path=("a", "b"), validation=("c",), source_field="s", target_field="t", held_out=0.25, tokenizer="x",
        vocab_size=512, max_source=5, max_target=6, batch_tokens=7, buckets=8 - 1, row_multiple=9,
    ),
    optimizer=UNUSUAL.optimizer, parallel=UNUSUAL.parallel,
    **{key: value for key, value in vars(UNUSUAL).items() if key in
       {"steps", "seed", "out", "resume", "max_seconds", "eval_interval", "checkpoint_interval", "average", "patience",
        "log_interval", "quiet", "tensorboard", "distributed", "hosts", "keep", "watchdog_seconds"}},
    label_smoothing=0.2, validation_sentences=3, samples=2,
)  # fmt: skip

SHARED = {
    key: value for key, value in vars(UNUSUAL).items() if key in
    {"model", "optimizer", "parallel", "steps", "seed", "out", "resume", "max_seconds", "eval_interval", "average",
     "checkpoint_interval", "patience", "log_interval", "quiet", "tensorboard", "init_from", "adapt", "distributed",
     "hosts", "keep", "watchdog_seconds"}
}  # fmt: skip
UNUSUAL_FINETUNE = FinetuneConfig(
    **SHARED, task="similarity", epochs=None, evaluations=2.0, lm_weight=0.25, head_dropout=0.75, labels=("x", "y"),
    class_weights=(1.0, 2.0), select="accuracy", samples=7,
    data=ExamplesConfig(
        path=("a",), validation=("b",), text=("c", "d"), label="e", options=("f",), held_out=0.25, tokenizer="x",
        vocab_size=512, max_length=16, batch_size=3, buckets=2,
    ),
)  # fmt: skip
UNUSUAL_CHAT = ChatConfig(
    **SHARED, epochs=None, evaluations=2.0, validation_answers=3, samples=7,
    data=ConversationsConfig(
        path=("a",), validation=("b",), prompt_field="p", response_field="r", input_field="i", held_out=0.25,
        tokenizer="x", vocab_size=512, sequence_length=16, batch_size=3, pack=False, too_long="drop-turns",
    ),
)  # fmt: skip
ALL_UNUSUAL = [UNUSUAL, UNUSUAL_TRANSLATION, UNUSUAL_FINETUNE, UNUSUAL_CHAT]


def through_json(config):
    return from_dict(type(config), json.loads(json.dumps(to_dict(config))))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name):
    assert through_json(recipe(name)) == recipe(name)


@pytest.mark.parametrize("unusual", ALL_UNUSUAL, ids=lambda config: type(config).__name__)
def test_every_field_survives_json(unusual):
    default = flatten(type(unusual)())
    same = [key for key, value in flatten(unusual).items() if value == default[key]]
    # The first allows for no class weights, the second for no budget in seconds.
    excluded = {"strict-reproducibility"} | ({"regression"} if isinstance(unusual, FinetuneConfig) else set())
    assert set(same) == excluded
    assert through_json(unusual) == unusual


def test_a_whole_number_is_a_float_where_one_is_wanted():
    config = from_dict(TrainConfig, {"max_seconds": 60, "optimizer": {"learning_rate": 1}})
    assert isinstance(config.max_seconds, float) and isinstance(config.optimizer.learning_rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "unknown key stepz; did you mean steps"),
        ({"model": {"layrs": 3}}, "unknown key model.layrs; did you mean layers"),
        ({"model": {"layers": "4"}}, "model.layers is '4'"),
        ({"model": {"layers": 4.0}}, "model.layers is 4.0"),
        ({"model": {"dropout": None}}, "model.dropout is None"),
        ({"model": {"dropout": "0.1"}}, "model.dropout is '0.1'"),
        ({"model": 3}, "model holds 3"),
        ({"steps": True}, "steps is True"),
        ({"max_seconds": True}, "max_seconds is True"),
        ({"quiet": 1}, "quiet is 1"),
        ({"data": {"path": "file.txt"}}, "data.path is 'file.txt'"),
        ({"data": {"path": ["file.txt", 1]}}, "data.path is "),
        ({"parallel": {"strategy": "pmapp"}}, "parallel.strategy is 'pmapp'"),
        ({"resume": ["latest"]}, "resume is "),
    ],
)
def test_json_that_is_no_config_is_refused_by_key(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize("values", [None, [], "x", 3])
def test_json_that_is_no_object_is_refused(values):
    with pytest.raises(ValueError, match=r"the config holds .*; it must be an object"):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(
    ("key", "value"),
    [(f"model.{name}", 0) for name in ("context", "layers", "heads", "width", "vocab-size", "hidden", "unroll")]
    + [
        ("model.heads", 5),
        ("model.dropout", 1.0),
        ("model.dropout", -0.1),
        ("model.attention-dropout", 1.0),
        ("model.norm-epsilon", 0.0),
    ]
    + [("model.init-std", 0.0), ("model.init-std", float("nan"))]
    + [("data.batch-size", 0), ("data.held-out", 0.0), ("data.held-out", 1.0), ("data.vocab-size", 256)]
    + [("data.sequence-length", 0), ("data.sequence-length", 1025)]
    + [(f"optimizer.{name}", 0.0) for name in ("learning-rate", "muon-learning-rate", "epsilon", "clip-norm")]
    + [("optimizer.learning-rate", float("nan")), ("optimizer.final-learning-rate", -1.0)]
    + [("optimizer.warmup-steps", -1), ("optimizer.weight-decay", -0.1), ("optimizer.beta1", 1.0)]
    + [("optimizer.beta2", -0.1), ("optimizer.decay-share", 0.0), ("optimizer.decay-share", 1.1)]
    + [("parallel.devices", 0), ("parallel.gradient-accumulation", 0)]
    + [("optimizer.skip-spikes", 0.0), ("optimizer.max-skipped", 0), ("watchdog-seconds", 0.0), ("keep", 0)]
    + [(name, 0) for name in ("steps", "eval-interval", "checkpoint-interval", "log-interval")]
    + [("seed", -1), ("seed", 2**31), ("sample-tokens", -1), ("max-seconds", 0.0)],
)
def test_a_bad_value_is_refused_by_the_name_of_its_flag(key, value):
    *section, name = key.replace("-", "_").split(".")
    values = {section[0]: {name: value}} if section else {name: value}
    with pytest.raises(ValueError, match=rf"^{key} is {value}, |^{key} is {value};"):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.encoder-layers", 0), ("model.decoder-layers", 0), ("label-smoothing", 1.0), ("label-smoothing", -0.1)]
    + [("validation-sentences", -1), ("samples", -1), ("average", 0), ("patience", 0), ("data.vocab-size", 256)]
    + [(f"data.{name}", 0) for name in ("max-source", "max-target", "batch-tokens", "buckets", "row-multiple")]
    + [("data.max-source", 256), ("data.max-target", 999), ("data.held-out", 1.0)],
)
def test_a_bad_value_of_a_translation_is_refused_too(key, value):
    *section, name = key.replace("-", "_").split(".")
    values = {section[0]: {name: value}} if section else {name: value}
    with pytest.raises(ValueError, match=rf"^{key} is {value}[,;]"):
        from_dict(TranslationConfig, values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": ("a", "b", "c")}, r"data\.path has 3 files; it takes one or two"),
        ({"path": ("a",), "validation": ("b", "c", "d")}, r"data\.validation has 3 files"),
        ({"validation": ("b",)}, r"data\.validation is given without data\.path"),
    ],
)
def test_files_that_are_no_pairs_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        PairsConfig(**data)


def test_sizes_are_known_by_name():
    assert (gpt_size("355M").layers, transformer_size("big").heads) == (24, 16)
    assert transformer_size("tiny", dropout=0.3).dropout == 0.3
    with pytest.raises(ValueError, match="no Transformer of size bas; did you mean base"):
        transformer_size("bas")
    with pytest.raises(ValueError, match="no GPT of size 124; did you mean 124M"):
        gpt_size("124")


def test_sinusoids_need_an_even_width():
    with pytest.raises(ValueError, match=r"model\.width is 9; sinusoidal"):
        GPTConfig(width=9, heads=3, positions="sinusoidal")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("samples", 0),
        ("beams", 0),
        ("lookup", -1),
        ("seed", -1),
        ("repetition_penalty", 0.0),
        ("no_repeat_ngram", 0),
        ("length_penalty", 11.0),
        ("length_penalty", float("nan")),
        ("stop", ("a", "")),
    ],
)
def test_bad_generation_settings_are_refused(key, value):
    shown = "an empty string" if key == "stop" else value
    with pytest.raises(ValueError, match=f"^{key.replace('_', '-')} is {shown}[;,]"):
        GenerationConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", 1.0), ("top_k", 1), ("top_p", 1.0), ("min_p", 0.5), ("lookup", 1)]
)
def test_what_has_no_meaning_with_beams_is_refused(key, value):
    with pytest.raises(ValueError, match=f"^{key.replace('_', '-')} has no meaning with beams 2"):
        GenerationConfig(beams=2, **{key: value})


def test_what_follows_from_other_fields():
    config = TrainConfig(model=GPTConfig(context=32, width=48), data=DataConfig(batch_size=5))
    assert (config.sequence_length, config.tokens_per_step, config.model.hidden_width) == (32, 160, 192)
    shorter = dataclasses.replace(config, data=DataConfig(batch_size=5, sequence_length=8))
    assert (shorter.sequence_length, shorter.tokens_per_step) == (8, 40)
    assert UNUSUAL.model.hidden_width == 24 and UNUSUAL.model.head_width == 4


def test_a_name_is_suggested_only_if_one_is_near():
    assert suggestion("layer", ["heads", "layers"]) == "; did you mean layers?"
    assert suggestion("zzz", ["heads", "layers"]) == "; there are heads, layers"
