"""Instruction and chat tuning: predict the answers, and nothing else, of conversations (see `data.conversations`)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxgpt.config import AdaptConfig, ChatConfig, GenerationConfig, GPTConfig
from jaxgpt.data.batches import WHOLE, Share, prefetch
from jaxgpt.data.conversations import (
    Conversation,
    EncodedConversation,
    encode_conversations,
    encode_prompt,
    open_conversations,
)
from jaxgpt.data.packing import PackedBatches
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from jaxgpt.generation.decode import Text, gpt_decoder
from jaxgpt.models.blocks import Parameters, decoding_parameters
from jaxgpt.models.gpt import GPT, next_token_loss
from jaxgpt.models.lora import attach, fold
from jaxgpt.tasks import initial
from jaxgpt.tasks.preparation import (
    Prepared,
    absolute,
    adopted,
    base_tokenizer,
    describe_gpt,
    located,
    with_epochs,
    with_vocabulary,
)
from jaxgpt.tasks.trained import fingerprint, load_pretrained
from jaxgpt.training.parallel import Layout, on_one_device
from jaxgpt.training.step import Batch, EvaluationSums, Loss

ANSWERED_AT_ONCE = 16


def loss(
    config: GPTConfig,
    adapt: AdaptConfig,
    parameters: Parameters,
    batch: Batch,
    dropout_keys: Key[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Negative log-likelihood of the answers: (sum in nats, how many tokens they have).

    Args:
        batch: see `data.packing.PackedBatches.batch`.
        dropout_keys: a key for each row; None for evaluation.
    """
    variables = {"params": attach(parameters, adapt)}
    hidden, _ = GPT(config).apply(variables, batch["tokens"], segments=batch["segments"], dropout_keys=dropout_keys)
    nll = next_token_loss(config, parameters, hidden, batch["targets"], batch["weights"])
    return nll, jnp.sum(batch["weights"])


class ChatTuning:
    """The task of answering (see `training.task.Task`)."""

    def __init__(
        self,
        config: ChatConfig,
        tokenizer: Tokenizer,
        train: Sequence[EncodedConversation],
        held_out: tuple[Sequence[EncodedConversation], Sequence[Conversation]],
        base: Parameters | None,
    ) -> None:
        """`config` has its vocabulary resolved; `base` is what `init_from` names; what is held out may be nothing."""
        self._config, self._tokenizer = config, tokenizer
        encoded, self._conversations = held_out
        data, room = config.data, config.sequence_length
        self.train = PackedBatches(train, room, data.batch_size, config.seed, together=data.pack)
        # Without any, what is trained on is evaluated: whether it was learned by heart.
        measured = encoded or train
        self._evaluation = PackedBatches(measured, room, data.batch_size, config.seed, together=data.pack)
        self.evaluation_batches = self._evaluation.in_order
        self.init = functools.partial(initial.separated, config, base=base)
        self.loss: Loss = functools.partial(loss, config.model, config.adapt)
        self.evaluation_sums: EvaluationSums = functools.partial(loss, config.model, config.adapt)
        self.width, self.unit = config.model.width, "tokens"

    def batches(self, start: int, stop: int, share: Share = WHOLE) -> Iterator[dict[str, np.ndarray]]:
        """The global batches of steps `start` to `stop`, made ahead of time in a thread."""
        return prefetch(functools.partial(self.train.batch, share=share), start, stop)

    def evaluation_metrics(self, sums: Sequence[np.ndarray], parameters: Parameters) -> dict[str, float]:
        """Loss and perplexity of the held-out answers, and how many come out to the letter when decoded greedily."""
        total, weight = map(float, sums)
        measured = {"eval/loss": total / weight, "eval/perplexity": math.exp(min(total / weight, 700.0))}
        count = min(self._config.validation_answers, len(self._conversations))
        if count:
            answers = self._answer(parameters, self._conversations[:count])
            wanted = [one.messages[-1].content for one in self._conversations[:count]]
            measured["eval/exact_match"] = sum(map(str.__eq__, answers, wanted)) / count
        return measured

    def sample(self, parameters: Parameters) -> Iterator[str]:
        """Held-out conversations, and what the model answers to the last message."""
        shown = self._conversations[: self._config.samples]
        for one, answer in zip(shown, self._answer(parameters, shown), strict=True):
            *before, wanted = one.messages
            said = "".join(f"{message.role}: {message.content}\n" for message in before)
            yield f"{said}model: {answer}\nwanted: {wanted.content}\n\n"

    def _answer(self, parameters: Parameters, conversations: Sequence[Conversation]) -> list[str]:
        """Greedy answers in place of the last messages."""
        whole = fold(on_one_device(parameters), self._config.adapt)
        local, end = jax.jit(decoding_parameters)(whole), self._tokenizer.separator
        decoder, context = gpt_decoder(self._config.model), self._config.model.context
        prompts = [encode_prompt(self._tokenizer, one.messages[:-1]) for one in conversations]
        texts = [Text(ids, len(ids), context - len(ids)) for ids in prompts if len(ids) < context]
        for start in range(0, len(texts), ANSWERED_AT_ONCE):
            for _ in decoder.decode(local, texts[start : start + ANSWERED_AT_ONCE], GREEDY, [end]):
                pass
        answers = iter([self._tokenizer.decode(text.new) for text in texts])
        return [next(answers) if len(ids) < context else "" for ids in prompts]


GREEDY = GenerationConfig(temperature=0.0)


def prepare(config: ChatConfig, say: Callable[[str], None]) -> Prepared:
    """Conversations to tokens, and the task on them (see `launch.train`).

    Raises:
        ValueError, FileNotFoundError: what is wrong with the data or the base model, or does not fit it.
    """
    sets = open_conversations(config.data)
    base = None if config.init_from is None else load_pretrained(config.init_from)
    if base is not None:
        tokenizer = base_tokenizer(config.data.tokenizer, base)
    elif config.data.tokenizer != "bpe":
        tokenizer = load_tokenizer(config.data.tokenizer)
    else:
        texts = (text for one in sets.train for m in one.messages for text in (f"{m.role}\n", m.content))
        tokenizer = train_bpe(texts, config.data.vocab_size)
    model = adopted(config.model, base)
    resolved = dataclasses.replace(model, vocab_size=with_vocabulary(model.vocab_size, tokenizer))
    config = dataclasses.replace(
        config,
        model=resolved,
        init_from=absolute(config.init_from),
        data=located(config.data),
    )
    config.check_fit()
    room = config.sequence_length
    train, _kept, notes = encode_conversations(tokenizer, sets.train, config.data, room)
    for reason, count in notes.items():
        say(f"training: {count:,} of {len(sets.train):,} conversations {reason}")
    if not train:
        raise ValueError(f"no conversation is left: all {len(sets.train)} are longer than {room} tokens")
    held_out, held_kept, notes = encode_conversations(tokenizer, sets.held_out, config.data, room)
    for reason, count in notes.items():
        say(f"held out: {count:,} of {len(sets.held_out):,} conversations {reason}")
    begin = None if base is None else base.parameters
    task = ChatTuning(config, tokenizer, train, (held_out, held_kept), begin)
    config = with_epochs(config, task.train.order.batches_per_epoch)
    digest = None if begin is None else fingerprint(begin)
    whole = f"{sets.fingerprint} {tokenizer.fingerprint} {room} {config.data.too_long} {config.data.pack} {digest}"
    announcement = functools.partial(_announcement, config, task, train, len(held_out))
    return Prepared(task, config, tokenizer, hashlib.sha256(whole.encode()).hexdigest(), announcement, base=digest)


def _announcement(
    config: ChatConfig, task: ChatTuning, train: Sequence[EncodedConversation], held_out: int, layout: Layout
) -> Iterator[str]:
    yield describe_gpt(config, task, layout)
    learned = sum(int(one.learned.sum()) for one in train)
    batches = task.train.order.batches_per_epoch
    yield (
        f"{len(train):,} conversations to train on, {held_out or 'none'} held out; {learned:,} tokens of answers; "
        f"{batches:,} batches an epoch, {task.train.padding_share:.0%} of them padding; {config.steps:,} steps "
        f"({config.steps / batches:.2g} epochs)"
    )
