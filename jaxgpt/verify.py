"""A certificate for one checkpoint: does it compute what it should, here and in PyTorch?

Every check compares two ways to the same numbers and says how far apart they are. Differences of logits are relative to
the largest logit, or absolute where that is below 1.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt import api
from jaxgpt import reference as torch_reference
from jaxgpt.api import LanguageModel
from jaxgpt.config import GPTConfig
from jaxgpt.models.cache import KVCache
from jaxgpt.models.gpt import decode_step, output_head, prefill
from jaxgpt.reference import logits

LONGEST = 64  # tokens a row: enough to see a difference, quick with the largest model
# Rounding of the compute dtype, many sums deep.
BOUNDS = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.05}


@dataclass(frozen=True)
class Check:
    """One comparison: it passes where `measured` is at most `bound`."""

    check: str
    measured: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether it holds; NaN does not."""
        return self.measured <= self.bound


def line(check: Check) -> str:
    """A check as a person reads it."""
    return f"{'ok  ' if check.passed else 'FAIL'}  {check.check:<44} {check.measured:<10.3g} bound {check.bound:.3g}"


def checks(model: LanguageModel, *, reference: Literal["none", "hf"] = "none", seed: int = 0) -> Iterator[Check]:
    """Yield each check as it is done, on random tokens.

    Raises:
        ValueError: `reference="hf"` without torch and transformers, or a model that has no counterpart there.
    """
    if reference == "hf":
        torch_reference.require_torch()
    yield from _weights(model)
    yield from _decoding(model, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        yield _round_trip(model, folder)
        if reference == "hf":
            config, dtype = model.config, model.config.parameter_dtype
            theirs = torch_reference.load_torch(folder, dtype)
            apart = torch_reference.compare(config, model.parameters, theirs, random_tokens(config, 2, seed))
            scale, bound = max(1.0, apart.largest_logit), BOUNDS[config.compute_dtype]
            yield Check("logits = PyTorch's", apart.logits / scale, bound)
            yield Check("gradients = PyTorch's", apart.gradient, 10 * bound)
            yield Check("logits after 3 AdamW steps = PyTorch's", apart.logits_after_steps / scale, 100 * bound)


def random_tokens(config: GPTConfig, rows: int, seed: int) -> Int[np.ndarray, "B T"]:
    """Rows of random ids, as long as the context but at most LONGEST."""
    shape = (rows, min(config.context, LONGEST))
    return np.random.default_rng(seed).integers(0, config.vocab_size or 1, shape, dtype=np.int32)


def difference(one: Float[Array, ...], other: Float[Array, ...]) -> float:
    """The largest difference, relative to the largest value of `other` where that is above 1."""
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b))))


def _weights(model: LanguageModel) -> Iterator[Check]:
    wrong = sum(int(jnp.sum(~jnp.isfinite(leaf))) for leaf in jax.tree.leaves(model.parameters))
    yield Check("weights that are not finite", float(wrong), 0.0)
    if model.config.tied_head:
        embedding = model.parameters["token_embedding"]["embedding"]
        same = jnp.array_equal(cast(Array, output_head(model.parameters)), embedding)
        yield Check("tied head that is not the token embedding", float(not same), 0.0)
    size = model.config.vocab_size or 0
    yield Check("token ids beyond the embedding", float(max(0, model.tokenizer.vocab_size - size)), 0.0)


def _decoding(model: LanguageModel, seed: int) -> Iterator[Check]:
    config, bound = model.config, BOUNDS[model.config.compute_dtype]
    tokens = random_tokens(config, 3, seed)
    length = tokens.shape[1]
    whole = logits(config, model.parameters, tokens)
    layout = model.decoding_parameters

    changed = tokens.copy()
    changed[:, -1] = (changed[:, -1] + 1) % (config.vocab_size or 1)
    moved = logits(config, model.parameters, changed)[:, :-1] - whole[:, :-1]
    yield Check("causality: a later token changes earlier", float(jnp.max(jnp.abs(moved), initial=0.0)), 0.0)

    begin = max(1, length // 2)
    read: Callable[..., tuple[Array, KVCache]] = jax.jit(functools.partial(prefill, config), static_argnums=3)
    step = jax.jit(functools.partial(decode_step, config))
    first, cache = read(layout, tokens[:, :begin], np.full(len(tokens), begin, np.int32), length)
    cached = [first]
    for place in range(begin, length):
        after, cache = step(layout, tokens[:, place : place + 1], cache)
        cached.append(after[:, 0])
    yield Check("cached = uncached", difference(jnp.stack(cached, 1), whole[:, begin - 1 :]), bound)

    counts = np.array([length, begin, max(1, length // 3)], np.int32)
    ragged, _ = read(layout, tokens, counts, length)
    alone = [logits(config, model.parameters, tokens[row : row + 1])[0, counts[row] - 1] for row in range(3)]
    yield Check("batched = single", difference(ragged, jnp.stack(alone)), bound)
    short = [logits(config, model.parameters, tokens[row : row + 1, : counts[row]])[0, -1] for row in range(3)]
    yield Check("padded = unpadded", difference(ragged, jnp.stack(short)), bound)


def _round_trip(model: LanguageModel, folder: Path) -> Check:
    """Export and load again: how many leaves are not the same bits."""
    api.export(model, folder)
    again = api.load(folder, dtype=model.config.parameter_dtype)
    ours, theirs = jax.tree.flatten_with_path(model.parameters)[0], jax.tree.flatten_with_path(again.parameters)[0]
    same_paths = [path for path, _ in ours] == [path for path, _ in theirs]
    if not same_paths:
        return Check("export, loaded again: leaves that differ", float(len(ours)), 0.0)
    differ = sum(
        np.asarray(a).tobytes() != np.asarray(b).tobytes() for (_, a), (_, b) in zip(ours, theirs, strict=True)
    )
    differ += model.config.norm != again.config.norm or model.config.activation != again.config.activation
    return Check("export, loaded again: leaves that differ", float(differ), 0.0)
