"""Language modelling: predict the next token of running text (Radford et al. 2018, section 3.1)."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxgpt.config import AdaptConfig, GenerationConfig, GPTConfig, TrainConfig
from jaxgpt.data import shards as data
from jaxgpt.data.batches import WHOLE, Share, WindowBatches, check_length, evaluation_batches, prefetch
from jaxgpt.data.corpus import is_prepared
from jaxgpt.data.shards import TokenizedText
from jaxgpt.generation.decode import Text, gpt_decoder
from jaxgpt.generation.text import Writer, write
from jaxgpt.models.blocks import Parameters, decoding_parameters, vocab_size
from jaxgpt.models.gpt import GPT, next_token_loss
from jaxgpt.models.lora import attach, fold
from jaxgpt.tasks import initial
from jaxgpt.tasks.preparation import Prepared, absolute, adopted, base_tokenizer, with_vocabulary
from jaxgpt.tasks.trained import fingerprint, load_pretrained
from jaxgpt.training import metrics
from jaxgpt.training.parallel import Layout, on_one_device
from jaxgpt.training.step import Batch, EvaluationSums, Loss


def loss(
    config: GPTConfig,
    adapt: AdaptConfig,
    parameters: Parameters,
    batch: Batch,
    dropout_keys: Key[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Negative log-likelihood of the targets: (sum in nats, sum of the weights).

    Args:
        batch: `tokens`, `targets` (B, T) and `weights` (B, T): 1 where the target counts.
        dropout_keys: a key for each row; None for evaluation.
    """
    variables = {"params": attach(parameters, adapt)}
    hidden, _ = GPT(config).apply(variables, batch["tokens"], dropout_keys=dropout_keys)
    nll = next_token_loss(config, parameters, hidden, batch["targets"], batch["weights"])
    return nll, jnp.sum(batch["weights"])


class LanguageModelling:
    """The task of pretraining: windows of running text, next-token loss, bits per byte (see `training.task.Task`)."""

    def __init__(self, config: TrainConfig, text: TokenizedText, base: Parameters | None = None) -> None:
        """`config.model.vocab_size` is set, and at least the tokenizer's; `base` is what `init_from` names.

        Raises:
            ValueError: a split of the text is shorter than one sequence.
        """
        self._config, self._text = config, text
        length, size = config.sequence_length, config.data.batch_size
        check_length(text.held_out, length, "held-out split")
        self._windows = WindowBatches(text.train, length, size, config.seed)
        self._prompt_ids(config.sample_prompt or "")  # better refused now than when all is done
        # As many sequences at once as a training step computes at once, so that what fits there fits here.
        at_once = size // config.parallel.gradient_accumulation
        self.evaluation_batches = functools.partial(evaluation_batches, text.held_out, length, at_once)
        self.init = functools.partial(initial.separated, config, base=base)
        self.loss: Loss = functools.partial(loss, config.model, config.adapt)
        self.evaluation_sums: EvaluationSums = functools.partial(loss, config.model, config.adapt)
        self.width, self.unit = config.model.width, "tokens"

    def batches(self, start: int, stop: int, share: Share = WHOLE) -> Iterator[dict[str, np.ndarray]]:
        """The global batches of steps `start` to `stop`, made ahead of time in a thread."""
        return prefetch(functools.partial(self._windows.batch, share=share), start, stop)

    def evaluation_metrics(self, sums: Sequence[np.ndarray], parameters: Parameters) -> dict[str, float]:
        """Loss (nats a token), perplexity, and bits per byte of the held-out text, which no tokenizer can flatter."""
        loss_sum, weight = map(float, sums)
        mean = loss_sum / weight
        tokens_per_byte = len(self._text.held_out) / self._text.held_out.bytes
        return {
            "eval/loss": mean,
            "eval/perplexity": math.exp(min(mean, 700.0)),
            "eval/bits_per_byte": mean / math.log(2) * tokens_per_byte,
        }

    def sample(self, parameters: Parameters) -> Iterator[str]:
        """Text by the model, in pieces, the prompt (see `TrainConfig.sample_prompt`) first."""
        if not self._config.sample_tokens:
            return
        tokenizer, model, prompt = self._text.tokenizer, self._config.model, self._config.sample_prompt or ""
        first = self._prompt_ids(prompt)
        text = Text(first, len(first), self._config.sample_tokens)
        whole = fold(on_one_device(parameters), self._config.adapt)
        local = jax.jit(decoding_parameters)(whole)
        settings = GenerationConfig(seed=self._config.seed)
        steps = gpt_decoder(model).decode(local, [text], settings, [tokenizer.separator])
        yield prompt
        for (piece,) in write(steps, [text], [Writer(tokenizer)]):
            yield piece

    def _prompt_ids(self, prompt: str) -> list[int]:
        if prompt:
            try:
                return self._text.tokenizer.encode(prompt)
            except ValueError as error:
                raise ValueError(f"sample-prompt: {error}; give another, or --sample-prompt None") from error
        several = self._text.train.documents > 1
        return [self._text.tokenizer.separator] if several else self._text.held_out.read(0, 1).tolist()


def prepare(config: TrainConfig, say: Callable[[str], None]) -> Prepared:
    """Text to tokens, and the task on them (see `launch.train`).

    Raises:
        ValueError, FileNotFoundError: what is wrong with the data, or does not fit it.
    """
    base = None if config.init_from is None else load_pretrained(config.init_from)
    prepared = config.data.path and is_prepared(Path(config.data.path[0]))  # then it says which tokenizer it has
    given = None if base is None else base.tokenizer if prepared else base_tokenizer(config.data.tokenizer, base)
    text = data.prepare(config.data, say, given)
    model = adopted(config.model, base)
    size = with_vocabulary(model.vocab_size, text.tokenizer)
    paths = tuple(path if path == "-" else os.path.abspath(path) for path in config.data.path)
    named = config.data.tokenizer in ("byte", "character", "bpe")
    tokenizer = config.data.tokenizer if named else os.path.abspath(config.data.tokenizer)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(model, vocab_size=size),
        init_from=absolute(config.init_from),
        data=dataclasses.replace(config.data, path=paths, tokenizer=tokenizer),
    )
    config.check_fit()
    begin = None if base is None else base.parameters
    task = LanguageModelling(config, text, begin)
    digest = None if begin is None else fingerprint(begin)
    data_digest = text.fingerprint if digest is None else f"{text.fingerprint} {digest}"
    announcement = functools.partial(_announcement, config, text)
    return Prepared(task, config, text.tokenizer, data_digest, announcement, base=digest)


def _announcement(config: TrainConfig, text: TokenizedText, layout: Layout) -> Iterator[str]:
    """What will be trained, on what, where, and about how much memory it takes."""
    model, devices = config.model, len(layout.devices)
    shapes = jax.eval_shape(lambda: initial.separated(config, jax.random.key(0), None)[0])
    count = metrics.count_parameters(shapes)
    memory = metrics.estimate_training_bytes(config, count, vocab_size(model), devices)
    yield (
        f"GPT with {count / 1e6:.2f}M parameters ({model.layers} layers x {model.width}, context {model.context}, "
        f"vocabulary {model.vocab_size:,}) on {devices} x {layout.devices[0].device_kind} ({layout.strategy}), "
        f"about {memory / 2**30:.2f} GiB a device"
    )
    epochs = config.steps * config.tokens_per_step / max(1, len(text.train))
    yield (
        f"{len(text.train):,} tokens to train on, {len(text.held_out):,} held out; {config.steps:,} steps of "
        f"{config.tokens_per_step:,} tokens ({epochs:.2g} epochs)"
        + (f", or {config.max_seconds:,.0f} seconds" if config.max_seconds else "")
    )
