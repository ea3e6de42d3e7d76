"""PyTorch's encoder-decoders, at their documented best for the CPU and with our weights, to be measured beside ours."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from measure import cores

from jaxgpt.config import OptimizerConfig, TransformerConfig
from jaxgpt.models.positions import sinusoidal_positions

# (sources, beams, how many new tokens) -> the best translation of each
Translator = Callable[[Sequence[Sequence[int]], int, int], list[list[int]]]


def require_torch() -> None:
    """Raise `ValueError` unless torch and transformers are installed."""
    if not all(importlib.util.find_spec(package) for package in ("torch", "transformers")):
        raise ValueError("--vs torch needs torch and transformers: pip install torch transformers")


def torch_translation_step(
    config: TransformerConfig,
    optimizer_config: OptimizerConfig,
    smoothing: float,
    parameters: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    compiled: bool = False,
) -> tuple[Callable[[], float], dict[str, Any]]:
    """`torch.nn.Transformer` between one scaled embedding and its transpose: a function that runs one training step.

    Float32, all cores, the fused Adam; post-norm without a last norm, and dropout where ours has it. PyTorch's layers
    call `scaled_dot_product_attention`, the decoder's with `is_causal`. `compiled`: through `torch.compile`, but for
    the optimiser.

    Args:
        parameters: ours, which it starts from.
        batch: see `data.pair_batches.PairBatches.batch`; every target counts.
    """
    import torch

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    model, embedding = _torch_transformer(config, parameters)
    drop = torch.nn.Dropout(config.dropout)
    both = torch.nn.ModuleList([embedding, model]).train()

    source, target, targets = (
        torch.from_numpy(batch[name].astype(np.int64)) for name in ("source", "target", "targets")
    )
    padding = torch.from_numpy(np.arange(source.shape[1]) >= batch["source_length"][:, None])
    later = torch.nn.Transformer.generate_square_subsequent_mask(target.shape[1])
    positions = torch.tensor(np.asarray(sinusoidal_positions(config.context, config.width)))
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)

    def embed(tokens: Any) -> Any:
        return drop(embedding(tokens) * math.sqrt(config.width) + positions[: tokens.shape[1]])

    def loss_of_batch() -> Any:
        hidden = model(
            embed(source),
            embed(target),
            tgt_mask=later,
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        logits = torch.nn.functional.linear(hidden, embedding.weight)
        return criterion(logits.flatten(0, 1), targets.flatten())

    forward = torch.compile(loss_of_batch) if compiled else loss_of_batch
    optimizer = torch.optim.Adam(
        both.parameters(),
        lr=optimizer_config.learning_rate,
        betas=(optimizer_config.beta1, optimizer_config.beta2),
        eps=optimizer_config.epsilon,
        fused=True,
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, {}


def _torch_transformer(config: TransformerConfig, parameters: Mapping[str, Any]) -> tuple[Any, Any]:
    """A `torch.nn.Transformer` with our weights, and its embedding."""
    import torch

    shape = (config.width, config.heads, config.hidden_width, config.dropout)
    same: dict[str, Any] = {"activation": config.activation, "layer_norm_eps": config.norm_epsilon, "batch_first": True}
    encoder_layer = torch.nn.TransformerEncoderLayer(*shape, **same)
    decoder_layer = torch.nn.TransformerDecoderLayer(*shape, **same)
    for layer in (encoder_layer, decoder_layer):
        layer.dropout.p = 0.0  # inside the feed-forward layer, where the paper has none; nor has it among the weights
        for attention in (m for m in layer.modules() if isinstance(m, torch.nn.MultiheadAttention)):
            attention.dropout = 0.0
    model = torch.nn.Transformer(
        config.width,
        config.heads,
        custom_encoder=torch.nn.TransformerEncoder(encoder_layer, config.encoder_layers, enable_nested_tensor=False),
        custom_decoder=torch.nn.TransformerDecoder(decoder_layer, config.decoder_layers),
        batch_first=True,
    )
    embedding = torch.nn.Embedding(*parameters["token_embedding"]["embedding"].shape)
    _assign(embedding, {"weight": parameters["token_embedding"]["embedding"]})
    for side, layers in (("encoder", model.encoder.layers), ("decoder", model.decoder.layers)):
        for number, layer in enumerate(layers):
            _assign(layer, _torch_layer(_layer(parameters[side], number)))
    return model, embedding


def marian_translator(
    config: TransformerConfig, parameters: Mapping[str, Any], end: int
) -> tuple[Translator, dict[str, Any]]:
    """Beam search of `transformers` by its `MarianMTModel`: float32, all cores, SDPA, its key-value cache.

    No token ends a text, so that all have as many new tokens as they may.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(cores())
    vocab_size = parameters["token_embedding"]["embedding"].shape[0]
    settings: dict[str, Any] = {"activation_function": config.activation, "scale_embedding": True}
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        shape = {"layers": layers, "attention_heads": config.heads, "ffn_dim": config.hidden_width}
        settings |= {f"{side}_{name}": value for name, value in shape.items()}
    model_config = transformers.MarianConfig(
        vocab_size=vocab_size,
        max_position_embeddings=config.context,
        d_model=config.width,
        decoder_start_token_id=end,
        pad_token_id=end,
        eos_token_id=None,
        forced_eos_token_id=None,
        attn_implementation="sdpa",
        **settings,
    )
    model = transformers.MarianMTModel(model_config).eval()
    _assign(model.model.shared, {"weight": parameters["token_embedding"]["embedding"]})
    for side, stack in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        _assign(stack.embed_positions, {"weight": sinusoidal_positions(config.context, config.width)})
        for number, layer in enumerate(stack.layers):
            _assign(layer, _marian_layer(_layer(parameters[side], number)))

    def translate(sources: Sequence[Sequence[int]], beams: int, new_tokens: int) -> list[list[int]]:
        lengths = np.array([len(source) + 1 for source in sources])
        inputs = np.full((len(sources), lengths.max()), end, np.int64)
        for row, source in zip(inputs, sources, strict=True):
            row[: len(source)] = source
        mask = np.arange(inputs.shape[1]) < lengths[:, None]
        with torch.inference_mode():
            made = model.generate(
                torch.from_numpy(inputs),
                attention_mask=torch.from_numpy(mask.astype(np.int64)),
                num_beams=beams,
                early_stopping=False,
                do_sample=False,
                use_cache=True,
                max_new_tokens=new_tokens,
            )
        return made[:, 1:].tolist()

    return translate, {}


def _layer(stack: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The parameters of one block, matrices (out, in) as PyTorch has them."""
    block = jax.tree.map(lambda leaf: np.asarray(leaf)[number], stack["blocks"])
    return jax.tree.map(lambda leaf: leaf.T, block)  # vectors stay as they are


def _torch_layer(block: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same under the names of `torch.nn.TransformerEncoderLayer` or `TransformerDecoderLayer`."""
    own, cross = block["attention"], block.get("cross_attention")
    names = {**_torch_attention("self_attn", own["qkv"], own["out"]), **_plain("linear1", block["mlp"]["up"])}
    names |= _plain("linear2", block["mlp"]["down"])
    norms = ["attention_norm", "mlp_norm"]
    if cross is not None:
        pair = jax.tree.map(lambda a, b: np.concatenate([a, b]), cross["query"], cross["key_value"])
        names |= _torch_attention("multihead_attn", pair, cross["out"])
        norms.insert(1, "cross_norm")
    for place, norm in enumerate(norms, 1):
        names |= _plain(f"norm{place}", block[norm])
    return names


def _torch_attention(name: str, products: dict[str, Any], out: dict[str, Any]) -> dict[str, np.ndarray]:
    inward = {f"{name}.in_proj_weight": products["kernel"], f"{name}.in_proj_bias": products["bias"]}
    return inward | _plain(f"{name}.out_proj", out)


def _marian_layer(block: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same under the names of a layer of `MarianEncoder` or `MarianDecoder`."""
    own, cross = block["attention"], block.get("cross_attention")
    names = _marian_attention("self_attn", own["qkv"], "qkv", own["out"])
    if cross is not None:
        names |= _marian_attention("encoder_attn", cross["query"], "q", cross["out"])
        names |= _marian_attention("encoder_attn", cross["key_value"], "kv", cross["out"])
        names |= _plain("encoder_attn_layer_norm", block["cross_norm"])
    names |= _plain("self_attn_layer_norm", block["attention_norm"]) | _plain("final_layer_norm", block["mlp_norm"])
    return names | _plain("fc1", block["mlp"]["up"]) | _plain("fc2", block["mlp"]["down"])


def _marian_attention(name: str, products: dict[str, Any], kinds: str, out: dict[str, Any]) -> dict[str, np.ndarray]:
    names = _plain(f"{name}.out_proj", out)
    for place, kind in enumerate(kinds):
        part = jax.tree.map(lambda leaf, place=place: np.split(leaf, len(kinds))[place], products)
        names |= _plain(f"{name}.{kind}_proj", part)
    return names


def _plain(name: str, layer: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weight and bias of a product or a norm."""
    return {f"{name}.weight": layer.get("kernel", layer.get("scale")), f"{name}.bias": layer["bias"]}


def _assign(module: Any, values: Mapping[str, Any]) -> None:
    """Load values into a module that has exactly these parameters."""
    import torch

    module.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in values.items()})
