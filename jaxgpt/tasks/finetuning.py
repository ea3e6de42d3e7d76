"""Fine-tuning with a task head: minimise -log P(label) (Radford et al. 2018, section 3.2)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxgpt.config import FinetuneConfig
from jaxgpt.data.batches import WHOLE, Share, prefetch
from jaxgpt.data.buckets import choose_bounds
from jaxgpt.data.example_batches import EncodedExamples, ExampleBatches, encode_examples
from jaxgpt.data.examples import class_names, open_examples, score_range
from jaxgpt.data.special_tokens import SPECIALS
from jaxgpt.data.tokenizer import load_tokenizer, train_bpe
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.gpt import GPT, next_token_loss
from jaxgpt.models.heads import HEAD, head_logits
from jaxgpt.models.lora import attach
from jaxgpt.models.losses import negative_log_likelihood
from jaxgpt.storage.runs import RunFolder
from jaxgpt.tasks import initial, judgements
from jaxgpt.tasks.preparation import Prepared, absolute, adopted, base_tokenizer, describe_gpt, located, with_epochs
from jaxgpt.tasks.trained import fingerprint, load_pretrained, load_trained
from jaxgpt.training.parallel import Layout
from jaxgpt.training.step import Batch, EvaluationSums, Loss

LEAST_CONTEXT = 8  # tokens: less than that leaves no room for a text between the special ones


def judge(
    config: FinetuneConfig, parameters: Parameters, batch: Batch, dropout_keys: Key[Array, " B"] | None = None
) -> tuple[Float[Array, "B C"], Float[Array, "B O T D"]]:
    """Logits of each example (classes, answers, or one score), and the hidden states they were read from.

    Args:
        batch: see `data.example_batches.ExampleBatches.batch`.
        dropout_keys: a key for each row; None for evaluation.
    """
    rows, options, length = batch["tokens"].shape
    keys = None
    if dropout_keys is not None:
        numbers = jnp.arange(options)
        keys = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))(dropout_keys).reshape(-1)
    variables = {"params": attach(parameters, config.adapt)}
    hidden, _ = GPT(config.model).apply(variables, batch["tokens"].reshape(-1, length), dropout_keys=keys)
    hidden = hidden.reshape(rows, options, length, -1)
    of_head = None if dropout_keys is None else jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, options)
    logits = head_logits(
        parameters[HEAD], hidden, batch["last"], config.task == "similarity", config.head_dropout, of_head
    )
    if config.task == "multiple-choice":
        logits = jnp.where(batch["real"], logits, jnp.finfo(logits.dtype).min)
    return logits, hidden


def task_losses(config: FinetuneConfig, logits: Float[Array, "B C"], batch: Batch) -> Float[Array, " B"]:
    """Of each example: negative log-likelihood of its label in nats, or of a score its squared error."""
    if config.regression:
        return jnp.square(logits[:, 0] - batch["label"])
    return negative_log_likelihood(logits, batch["label"])


def lm_loss(
    config: FinetuneConfig, parameters: Parameters, hidden: Float[Array, "B O T D"], batch: Batch
) -> Float[Array, ""]:
    """Weighted sum of the negative log-likelihood of each next token: the auxiliary objective of section 3.2."""
    rows, options, length, width = hidden.shape
    flat = (rows * options, length)
    targets, weights = batch["targets"].reshape(flat), batch["lm_weights"].reshape(flat)
    return next_token_loss(config.model, parameters, hidden.reshape(*flat, width), targets, weights)


def loss(
    config: FinetuneConfig, parameters: Parameters, batch: Batch, dropout_keys: Key[Array, " B"] | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What is minimised, L2 + lambda L1 of section 3.2: (sum over the examples, sum of their weights)."""
    logits, hidden = judge(config, parameters, batch, dropout_keys)
    total = jnp.sum(task_losses(config, logits, batch) * batch["weights"])
    if config.lm_weight:
        total = total + config.lm_weight * lm_loss(config, parameters, hidden, batch)
    return total, jnp.sum(batch["weights"])


def evaluation_sums(
    config: FinetuneConfig, count: int, outputs: int, parameters: Parameters, batch: Batch
) -> tuple[Array, ...]:
    """Over a batch: task loss, weights, language-model loss and its weights; and the logits, each at its example's row.

    Args:
        count, outputs: rows and columns of that table, of all evaluation batches together.
    """
    logits, hidden = judge(config, parameters, batch)
    weights = batch["weights"]
    table = jnp.zeros((count, outputs), logits.dtype).at[batch["example"]].add(logits * weights[:, None])
    lm = lm_loss(config, parameters, hidden, batch) if config.lm_weight else jnp.zeros((), logits.dtype)
    total = jnp.sum(task_losses(config, logits, batch) * weights)
    return total, jnp.sum(weights), lm, jnp.sum(batch["lm_weights"]), table


class FineTuning:
    """The task of judging examples by a head on a GPT (see `training.task.Task`)."""

    def __init__(
        self,
        config: FinetuneConfig,
        train: EncodedExamples,
        held_out: EncodedExamples,
        base: Parameters | None,
    ) -> None:
        """`config` has its vocabulary and labels resolved; `base` is what `init_from` names."""
        self._config, self._held_out = config, held_out
        data = config.data
        bounds = choose_bounds(train.lengths, 0, data.batch_size, data.buckets)
        self.train = ExampleBatches(train, bounds, data.batch_size, config.seed, config.class_weights)
        self._evaluation = ExampleBatches(held_out, bounds, data.batch_size, config.seed)
        self._outputs = max(config.outputs, held_out.most_sequences if config.task == "multiple-choice" else 1)
        self.evaluation_batches = self._evaluation.in_order
        self.init = functools.partial(initial.separated, config, base=base)
        self.loss: Loss = functools.partial(loss, config)
        self.evaluation_sums: EvaluationSums = functools.partial(evaluation_sums, config, len(held_out), self._outputs)
        self.width, self.unit = config.model.width, "examples"

    def batches(self, start: int, stop: int, share: Share = WHOLE) -> Iterator[dict[str, np.ndarray]]:
        """The global batches of steps `start` to `stop`, made ahead of time in a thread."""
        return prefetch(functools.partial(self.train.batch, share=share), start, stop)

    def evaluation_metrics(self, sums: Sequence[np.ndarray], parameters: Parameters) -> dict[str, float]:
        """Loss of the task, of the language model, and what the judgements are worth."""
        total, weight, lm, lm_weight, table = sums
        measured = {"eval/loss": float(total / weight)}
        if self._config.lm_weight:
            measured["eval/lm_loss"] = float(lm / lm_weight)
            # What train/loss is, which the loss of the task alone cannot be compared with.
            measured["eval/objective"] = measured["eval/loss"] + self._config.lm_weight * measured["eval/lm_loss"]
        labels = self._held_out.labels
        if self._config.regression:
            scores = table[:, 0]
            figures = {"pearson": judgements.pearson(scores, labels), "spearman": judgements.spearman(scores, labels)}
        else:
            chosen = table.argmax(axis=1)
            figures = judgements.classification_scores(judgements.confusion_matrix(labels, chosen, self._outputs))
            figures = {"accuracy": figures["accuracy"]} if self._config.task == "multiple-choice" else figures
        return measured | {f"eval/{name}": value for name, value in figures.items()}

    def sample(self, parameters: Parameters) -> Iterator[str]:
        """Nothing: what the chosen checkpoint makes of the held-out examples is shown instead (see `conclude`)."""
        return iter(())

    def conclude(self, run: RunFolder, say: Callable[[str], None]) -> None:
        """Show what the chosen checkpoint makes of the held-out examples: a few of them, and the confusion matrix."""
        trained = load_trained(run, FinetuneConfig)
        config = without_adapter(trained.config)
        program = jax.jit(functools.partial(evaluation_sums, config, len(self._held_out), self._outputs))
        parts = [program(trained.parameters, batch)[-1] for batch in self.evaluation_batches()]
        table = np.sum([np.asarray(part) for part in parts], axis=0)
        lines = []
        for example, row in zip(self._held_out.examples[: config.samples], table, strict=False):
            lines += [f"text      {' | '.join(example.texts)}", f"judged    {verdict(config, row, example.texts)}"]
            lines += [f"labelled  {example.label}", ""]
        if lines:
            say("\n" + "\n".join(lines).rstrip())
            run.add_sample(config.steps, "\n".join(lines))
        if config.regression or config.task == "multiple-choice":
            return
        if not run.writes:
            return
        confusion = judgements.confusion_matrix(self._held_out.labels, table.argmax(axis=1), config.outputs)
        text = judgements.confusion_table(confusion, config.labels)
        (run.path / "confusion.txt").write_text(text, "utf-8")
        judgements.draw_confusion(confusion, config.labels, run.path / "confusion.png")
        say("\n" + text.rstrip())


def without_adapter(config: FinetuneConfig) -> FinetuneConfig:
    """The config of a model that was read back, whose adapter is folded into its weights."""
    return dataclasses.replace(config, adapt=dataclasses.replace(config.adapt, method="all"))


def verdict(config: FinetuneConfig, logits: np.ndarray, texts: Sequence[str]) -> str:
    """What the logits of one example say: a label, an answer, or a score."""
    if config.regression:
        low, high = map(float, config.labels)
        return f"{low + (high - low) * (float(logits[0]) + 1) / 2:.4g}"
    best = int(np.argmax(logits))
    return texts[1 + best] if config.task == "multiple-choice" else config.labels[best]


def prepare(config: FinetuneConfig, say: Callable[[str], None]) -> Prepared:
    """Examples to tokens, and the task on them (see `launch.train`).

    Raises:
        ValueError, FileNotFoundError: what is wrong with the data or the base model, or does not fit it.
    """
    sets = open_examples(config.data, config.task)
    base = None if config.init_from is None else load_pretrained(config.init_from)
    if base is not None:
        tokenizer = base_tokenizer(config.data.tokenizer, base)
    elif config.data.tokenizer != "bpe":
        tokenizer = load_tokenizer(config.data.tokenizer)
    else:
        tokenizer = train_bpe((text for e in sets.train for text in e.texts), config.data.vocab_size)
    labels: tuple[str, ...] = ()
    if config.regression:
        labels = score_range(config.labels, sets.train)
    elif config.task != "multiple-choice":
        labels = class_names(config.labels, sets.train, sets.held_out)
    if config.class_weights and len(config.class_weights) != len(labels):
        raise ValueError(
            f"class-weights has {len(config.class_weights)} numbers, and there are {len(labels)} classes: "
            f"{', '.join(map(repr, labels))}"
        )
    model = adopted(config.model, base)
    size = max(base.config.vocab_size or 0, base.tokenizer.vocab_size) if base else tokenizer.vocab_size
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(model, vocab_size=size + SPECIALS),
        labels=labels,
        init_from=absolute(config.init_from),
        data=located(config.data),
    )
    config.check_fit()
    if model.context < LEAST_CONTEXT:
        raise ValueError(f"the model's context of {model.context} tokens is too short for a text and special tokens")
    limit = config.data.max_length or model.context
    train, held_out = (encode_examples(tokenizer, config, part, limit) for part in (sets.train, sets.held_out))
    for part, name in ((train, "training"), (held_out, "held out")):
        cut = sum(one.cut > 0 for one in part.sequences)
        if cut:
            say(f"{name}: {cut:,} of {len(part):,} examples are longer than {limit} tokens, and were cut at their end")
    begin = None if base is None else base.parameters
    task = FineTuning(config, train, held_out, begin)
    config = with_epochs(config, task.train.order.batches_per_epoch)
    base_digest = None if begin is None else fingerprint(begin)
    whole = f"{sets.fingerprint} {tokenizer.fingerprint} {limit} {base_digest}"
    return Prepared(
        task, config, tokenizer, hashlib.sha256(whole.encode()).hexdigest(),
        functools.partial(_announcement, config, task, len(train), len(held_out)),
        base=base_digest, conclude=task.conclude,
    )  # fmt: skip


def _announcement(config: FinetuneConfig, task: FineTuning, train: int, held_out: int, layout: Layout) -> Iterator[str]:
    yield describe_gpt(config, task, layout)
    batches = task.train.order.batches_per_epoch
    yield (
        f"{train:,} examples to train on, {held_out:,} held out; {batches:,} batches an epoch, {config.steps:,} steps "
        f"({config.steps / batches:.2g} epochs)" + (f"; labels {', '.join(config.labels)}" if config.labels else "")
    )
