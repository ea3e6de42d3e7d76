"""Translation: predict each token of the target from the source and what is before it (Vaswani et al. 2017)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxgpt.config import GenerationConfig, TransformerConfig, TranslationConfig
from jaxgpt.data.batches import WHOLE, Share, prefetch
from jaxgpt.data.buckets import choose_bounds
from jaxgpt.data.pair_batches import PairBatches, pair_lengths
from jaxgpt.data.pairs import Dropped, EncodedPairs, encode_pairs, joint_tokenizer, open_pairs
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.generation.translate import translate_tokens, translation_decoder
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.fused_loss import smoothed_divergence_sums
from jaxgpt.models.transformer import Transformer, decoding_parameters, init_parameters, output_head
from jaxgpt.tasks.preparation import Prepared, located, with_vocabulary
from jaxgpt.tasks.scores import bleu, exact_match
from jaxgpt.training.metrics import count_parameters
from jaxgpt.training.parallel import Layout, on_one_device
from jaxgpt.training.step import Batch, EvaluationSums, Loss

GREEDY = GenerationConfig(beams=1, early_stopping="true")


def sums(
    config: TransformerConfig,
    smoothing: float,
    parameters: Parameters,
    batch: Batch,
    dropout_keys: Key[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Sum over a batch: label-smoothed divergence, weights, negative log-likelihood (nats; see `smoothed_divergence`).

    Args:
        batch: see `data.pair_batches.PairBatches.batch`.
        dropout_keys: a key for each row; None for evaluation.
    """
    mask = jnp.arange(batch["source"].shape[1]) < batch["source_length"][:, None]
    model, variables = Transformer(config), {"params": parameters}
    hidden = model.apply(variables, batch["source"], mask, batch["target"], dropout_keys=dropout_keys)
    divergence, nll = smoothed_divergence_sums(
        cast(Array, hidden), output_head(parameters), batch["targets"], batch["weights"], smoothing
    )
    return divergence, jnp.sum(batch["weights"]), nll


def loss(
    config: TransformerConfig,
    smoothing: float,
    parameters: Parameters,
    batch: Batch,
    dropout_keys: Key[Array, " B"] | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What is minimised, the label-smoothed divergence: (sum in nats, sum of the weights)."""
    divergence, weight, _ = sums(config, smoothing, parameters, batch, dropout_keys)
    return divergence, weight


def _init(config: TransformerConfig, key: Key[Array, ""]) -> tuple[Parameters, Parameters]:
    return init_parameters(config, key), {}


class Translation:
    """The task of translation: bucketed pairs, label smoothing, BLEU (see `training.task.Task`)."""

    def __init__(
        self, config: TranslationConfig, tokenizer: Tokenizer, train: EncodedPairs, held_out: EncodedPairs
    ) -> None:
        """`config.model.vocab_size` is set, and at least the tokenizer's."""
        self._config, self._tokenizer, self._held_out = config, tokenizer, held_out
        data, end = config.data, tokenizer.separator
        bounds = choose_bounds(pair_lengths(train), data.batch_tokens, data.row_multiple, data.buckets)
        # As many tokens at once as a training step computes at once, so that what fits there fits here.
        at_once = max(1, data.batch_tokens // config.parallel.gradient_accumulation)
        self.pairs = PairBatches(train, end, bounds, data.batch_tokens, data.row_multiple, config.seed)
        self._held_out_pairs = PairBatches(held_out, end, bounds, at_once, data.row_multiple, config.seed)
        self._decoder = translation_decoder(config.model, end)
        self.evaluation_batches = self._held_out_pairs.in_order
        self.init = functools.partial(_init, config.model)
        self.evaluation_sums: EvaluationSums = functools.partial(sums, config.model, config.label_smoothing)
        self.loss: Loss = functools.partial(loss, config.model, config.label_smoothing)
        self.width, self.unit = config.model.width, "tokens"

    def batches(self, start: int, stop: int, share: Share = WHOLE) -> Iterator[dict[str, np.ndarray]]:
        """The global batches of steps `start` to `stop`, made ahead of time in a thread."""
        return prefetch(functools.partial(self.pairs.batch, share=share), start, stop)

    def evaluation_metrics(self, sums: Sequence[np.ndarray], parameters: Parameters) -> dict[str, float]:
        """Smoothed loss, perplexity (unsmoothed), and what greedy translations of held-out sentences are worth."""
        divergence, weight, nll = map(float, sums)
        measured = {"eval/loss": divergence / weight, "eval/perplexity": math.exp(min(nll / weight, 700.0))}
        count = min(self._config.validation_sentences, len(self._held_out))
        if count:
            texts = self._translate(parameters, self._held_out.source[:count])
            references = [target for _, target in self._held_out.text[:count]]
            measured |= {"eval/bleu": bleu(texts, references), "eval/exact_match": exact_match(texts, references)}
        return measured

    def sample(self, parameters: Parameters) -> Iterator[str]:
        """Held-out sentences, what the model makes of them, and what they should be."""
        count = min(self._config.samples, len(self._held_out))
        if not count:
            return
        texts = self._translate(parameters, self._held_out.source[:count])
        for text, (source, target) in zip(texts, self._held_out.text, strict=False):
            yield f"source     {source}\nmodel      {text}\nreference  {target}\n\n"

    def _translate(self, parameters: Parameters, sources: Sequence[np.ndarray]) -> list[str]:
        local = jax.jit(decoding_parameters)(on_one_device(parameters))
        end = self._tokenizer.separator
        found = translate_tokens(self._decoder, local, [source.tolist() for source in sources], GREEDY, end)
        return [self._tokenizer.decode([token for token in best[0].tokens if token != end]) for best in found]


def prepare(config: TranslationConfig, say: Callable[[str], None]) -> Prepared:
    """Pairs to tokens, and the task on them (see `launch.train`).

    Raises:
        ValueError, FileNotFoundError: what is wrong with the data, or does not fit it.
    """
    corpus = open_pairs(config.data)
    tokenizer = joint_tokenizer(config.data, corpus.train)
    room = config.model.context - 1
    limits = (config.data.max_source or room, config.data.max_target or room)
    dropped = Dropped("training"), Dropped("held out")
    train = encode_pairs(tokenizer, corpus.train, *limits, dropped[0])
    held_out = encode_pairs(tokenizer, corpus.held_out, *limits, dropped[1])
    for line in (*dropped[0].report(len(train)), *dropped[1].report(len(held_out))):
        say(line)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=with_vocabulary(config.model.vocab_size, tokenizer)),
        data=located(config.data),
    )
    task = Translation(config, tokenizer, train, held_out)
    fingerprint = hashlib.sha256(f"{corpus.fingerprint} {tokenizer.fingerprint} {limits}".encode()).hexdigest()
    return Prepared(
        task, config, tokenizer, fingerprint, functools.partial(_announcement, config, task, train, held_out)
    )


def _announcement(
    config: TranslationConfig, task: Translation, train: EncodedPairs, held_out: EncodedPairs, layout: Layout
) -> Iterator[str]:
    model = config.model
    count = count_parameters(jax.eval_shape(task.init, jax.random.key(0))[0])
    yield (
        f"Transformer with {count / 1e6:.2f}M parameters ({model.encoder_layers} + {model.decoder_layers} layers x "
        f"{model.width}, vocabulary {model.vocab_size:,}) on {len(layout.devices)} x "
        f"{layout.devices[0].device_kind} ({layout.strategy})"
    )
    batches = task.pairs.order.batches_per_epoch
    yield (
        f"{len(train):,} pairs to train on, {len(held_out):,} held out; {batches:,} batches an epoch, "
        f"{config.steps:,} steps ({config.steps / batches:.2g} epochs)"
        + (f", or {config.max_seconds:,.0f} seconds" if config.max_seconds else "")
    )
    shapes = ", ".join(f"{bucket.rows} x {bucket.length}" for bucket in task.pairs.order.buckets)
    yield f"batches of {shapes} (sentences x tokens); {task.pairs.padding_share:.0%} of the target places are padding"
