"""From logits to a token: pure functions. Dimension letters: see `models/attention.py`.

A filter takes logits and returns them with what may not be drawn at -inf. `choose_token` applies them in the order that
`transformers` does: repetition penalty, n-grams, stop tokens; then temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import GenerationConfig
from jaxgpt.models.rows import first_greatest, log_sum_exp

Number = float | Float[Array, ""]


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keep the k largest logits of each row; of equal ones, those with the lower id (Fan et al. 2018)."""
    values, indices = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.full_like(logits, -jnp.inf).at[jnp.arange(logits.shape[0])[:, None], indices].set(values)


def keep_top_p(logits: Float[Array, "B V"], p: Number) -> Float[Array, "B V"]:
    """Keep the fewest most likely tokens of each row that together have probability p (Holtzman et al. 2020).

    At least one; of equally likely ones, those with the lower id come first.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep = jnp.zeros(logits.shape, bool).at[jnp.arange(logits.shape[0])[:, None], order].set((before < p) | (p >= 1))
    return jnp.where(keep, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "B V"], p: Number) -> Float[Array, "B V"]:
    """Keep the tokens at least p times as likely as the most likely one of their row (Nguyen et al. 2024)."""
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p), logits, -jnp.inf)


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Int[Array, "B S"], counts: Int[Array, " B"], penalty: Number
) -> Float[Array, "B V"]:
    """Divide the positive logits of tokens seen before by `penalty`, multiply the negative ones (Keskar et al. 2019).

    Args:
        seen: the tokens of each row so far, prompt included, padded at the end.
        counts: how many of them there are.
    """
    valid = jnp.arange(seen.shape[1]) < counts[:, None]
    rows = jnp.arange(logits.shape[0])[:, None]
    repeated = jnp.zeros(logits.shape, bool).at[rows, seen].max(valid)
    return jnp.where(repeated, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def ban_repeated_ngrams(
    logits: Float[Array, "B V"], seen: Int[Array, "B S"], counts: Int[Array, " B"], n: int
) -> Float[Array, "B V"]:
    """Forbid each token that would complete a sequence of n tokens which is in `seen` already (Paulus et al. 2018)."""
    rows, length = jnp.arange(logits.shape[0])[:, None], seen.shape[1]
    if length < n:
        return logits
    # At each place: are its n - 1 tokens the newest n - 1? Then what followed there may not follow here.
    places = jnp.arange(length - n + 1)
    same = places + n - 1 < counts[:, None]
    for offset in range(n - 1):
        newest = jnp.take_along_axis(seen, jnp.maximum(counts[:, None] - n + 1 + offset, 0), axis=1)
        same &= seen[:, offset : length - n + 1 + offset] == newest
    banned = jnp.zeros(logits.shape, bool).at[rows, seen[:, n - 1 :]].max(same)
    return jnp.where(banned, -jnp.inf, logits)


def row_keys(seed: int | Int[Array, ""], samples: Int[Array, " B"], positions: Int[Array, " B"]) -> Key[Array, " B"]:
    """The random key of each row from the seed, the number of the sample of its prompt, and the token's position.

    Not from its place in the batch: so a prompt gets the same text alone as among others.
    """
    base = jax.random.key(seed)
    return jax.vmap(lambda s, p: jax.random.fold_in(jax.random.fold_in(base, s), p))(samples, positions)


@flax.struct.dataclass
class Rules:
    """A `GenerationConfig` as `choose_token` needs it: None is off, and numbers may change without compiling."""

    temperature: Number | None = 1.0
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    stop_tokens: tuple[int | Int[Array, ""], ...] = ()
    top_k: int | None = flax.struct.field(pytree_node=False, default=None)
    no_repeat_ngram: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def need_history(self) -> bool:
        """Whether the tokens so far decide what may come."""
        return self.repetition_penalty is not None or self.no_repeat_ngram is not None


def rules(config: GenerationConfig, stop_tokens: Sequence[int]) -> Rules:
    """Leave out what has no effect, so that it costs nothing."""
    return Rules(
        temperature=config.temperature or None,
        top_p=None if config.top_p == 1 else config.top_p,
        min_p=config.min_p,
        repetition_penalty=None if config.repetition_penalty == 1 else config.repetition_penalty,
        stop_tokens=tuple(stop_tokens) if config.min_new_tokens else (),
        top_k=config.top_k,
        no_repeat_ngram=config.no_repeat_ngram,
    )


def process_logits(
    logits: Float[Array, "B V"],
    rules: Rules,
    seen: Int[Array, "B S"] | None,
    counts: Int[Array, " B"] | None,
    too_early: Bool[Array, " B"],
) -> Float[Array, "B V"]:
    """What depends on the text so far: repetition penalty, banned n-grams, and no stop token where it is too early."""
    if seen is not None and counts is not None:
        if rules.repetition_penalty is not None:
            logits = penalize_repetition(logits, seen, counts, rules.repetition_penalty)
        if rules.no_repeat_ngram is not None:
            logits = ban_repeated_ngrams(logits, seen, counts, rules.no_repeat_ngram)
    for token in rules.stop_tokens:
        logits = logits.at[:, token].set(jnp.where(too_early, -jnp.inf, logits[:, token]))
    return logits


def filter_logits(logits: Float[Array, "B V"], rules: Rules) -> Float[Array, "B V"]:
    """Logits divided by the temperature, with what the filters forbid at -inf; each filter sees what the last left."""
    if rules.temperature is None:
        return logits
    logits = logits / rules.temperature
    if rules.top_k is not None:
        logits = keep_top_k(logits, rules.top_k)
    if rules.top_p is not None:
        logits = keep_top_p(logits, rules.top_p)
    if rules.min_p is not None:
        logits = keep_min_p(logits, rules.min_p)
    return logits


def sample_token(logits: Float[Array, "B V"], keys: Key[Array, " B"], greedy: bool = False) -> Int[Array, " B"]:
    """Draw one token a row from softmax(logits), or take the most likely one."""
    if greedy:
        return first_greatest(logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@jax.jit
def choose_token(
    logits: Float[Array, "B V"],
    rules: Rules,
    seed: int | Int[Array, ""],
    samples: Int[Array, " B"],
    positions: Int[Array, " B"],
    too_early: Bool[Array, " B"],
    seen: Int[Array, "B S"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Choose the next token of each row.

    Args:
        seed, samples, positions: see `row_keys`; the position is the number of tokens before the new one.
        too_early: where no stop token may come yet.
        seen: those tokens, padded at the end; needed where `rules.need_history`.

    Returns:
        The tokens, and their log-probabilities under the model itself, whatever the rules.
    """
    allowed = process_logits(logits, rules, seen, positions, too_early)
    token = sample_token(
        filter_logits(allowed, rules), row_keys(seed, samples, positions), greedy=rules.temperature is None
    )
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)
    return token, (picked - log_sum_exp(logits))[:, 0]
