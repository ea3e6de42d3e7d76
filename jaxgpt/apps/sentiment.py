"""A classifier: texts in, labels and probabilities out, from a run of `python train.py sentiment`, finetune."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxgpt.config import Dtype
from jaxgpt.data.batches import Batch
from jaxgpt.data.example_batches import EncodedExamples, ExampleBatches, input_forms
from jaxgpt.data.examples import Example
from jaxgpt.environment import use_compilation_cache
from jaxgpt.generation.decode import bucket
from jaxgpt.models.blocks import Parameters
from jaxgpt.tasks.classifiers import load_classifier
from jaxgpt.tasks.finetuning import judge, verdict, without_adapter
from jaxgpt.tasks.trained import Which

BATCHES_AT_ONCE = 8  # of which each has texts of about the same length


@dataclass(frozen=True)
class Judged:
    """A text, or several that belong together, and what is said of it."""

    texts: tuple[str, ...]
    label: str | None
    """as it stands in the training file; of a choice the answer chosen; of regression the score; None without text"""
    probabilities: dict[str, float]
    """of each class, or of each answer; empty for regression"""
    cut: int = 0
    """tokens that were beyond the limit, and were not read"""


class Classifier:
    """A fine-tuned GPT with its head, its labels and its tokenizer."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        checkpoint: Which | None = None,
        dtype: Dtype | None = None,
        base: str | None = None,
    ) -> None:
        """Load a fine-tuning run, or a classifier that `export` wrote.

        Args:
            model: its folder.
            checkpoint, dtype, base: see `tasks.trained.load_trained`.

        Raises:
            FileNotFoundError: there is none, or no checkpoint in the run yet.
            ValueError: a run of another task, another model, or a damaged file.
        """
        use_compilation_cache()
        trained = load_classifier(model, checkpoint, dtype, base)
        self.config = without_adapter(trained.config)
        self.parameters: Parameters = trained.parameters
        self.tokenizer = trained.tokenizer

    @property
    def texts_needed(self) -> int | None:
        """How many texts make an example; None: a context and two answers or more."""
        return {"classification": 1, "entailment": 2, "similarity": 2}.get(self.config.task)

    @functools.cached_property
    def _program(self) -> Callable[[Parameters, Batch], jax.Array]:
        return jax.jit(lambda parameters, batch: judge(self.config, parameters, batch)[0])

    def classify(self, *texts: str) -> Judged:
        """Judge one example: a text, or the texts that belong together."""
        (judged,) = self.classify_batch([texts])
        return judged

    def classify_batch(self, examples: Iterable[str | Sequence[str]], *, batch_size: int = 32) -> list[Judged]:
        """Judge examples, each as it would be alone; the results are in their order.

        An example is a text, or the texts that belong together. One with an empty text has no label.

        Raises:
            ValueError: one string instead of several, or an example with another number of texts than the task has.
        """
        if isinstance(examples, str):
            raise ValueError("classify_batch takes several examples; classify takes one")
        given = [(one,) if isinstance(one, str) else tuple(one) for one in examples]
        for texts in given:
            self._check(texts)
        results = [Judged(texts, None, {}) for texts in given]
        wanted = [number for number, texts in enumerate(given) if all(text.strip() for text in texts)]
        if not wanted:
            return results
        config = self.config
        assert config.model.vocab_size is not None
        stripped = [tuple(text.strip() for text in given[number]) for number in wanted]
        limit = config.data.max_length or config.model.context
        forms = input_forms(self.tokenizer, config.model.vocab_size, config.task, stripped, limit)
        nothing = np.zeros(len(forms), np.float32 if config.regression else np.int32)
        encoded = EncodedExamples(forms, nothing, [Example(texts, "") for texts in stripped])
        # Lengths of powers of two, and always as many rows: few shapes, so few compilations.
        bounds = sorted({bucket(int(length), limit) for length in encoded.lengths})
        rows = batch_size if len(wanted) > 1 else 1
        for batch in ExampleBatches(encoded, bounds, rows, 0).in_order():
            logits = np.asarray(self._program(self.parameters, batch), np.float64)
            for row in np.flatnonzero(batch["weights"]):
                number = wanted[batch["example"][row]]
                cut = forms[batch["example"][row]].cut
                results[number] = self._judged(given[number], logits[row], cut)
        return results

    def stream(
        self,
        examples: Iterable[str | Sequence[str]],
        *,
        batch_size: int = 32,
        ready: Callable[[], bool] = lambda: True,
    ) -> Iterator[Judged]:
        """Judge examples as they come, in their order, many at once.

        `ready` says whether the next is there already: until it is, none that is waits for more.
        """
        examples = iter(examples)
        for first in examples:
            chunk = [first]
            while len(chunk) < batch_size * BATCHES_AT_ONCE and ready():
                following = list(itertools.islice(examples, 1))
                if not following:
                    break
                chunk += following
            yield from self.classify_batch(chunk, batch_size=batch_size)

    def _check(self, texts: tuple[str, ...]) -> None:
        needed, task = self.texts_needed, self.config.task
        if needed is None and len(texts) < 3:
            raise ValueError(f"the task {task} takes a context and two answers or more, and {len(texts)} texts came")
        if needed is not None and len(texts) != needed:
            raise ValueError(f"the task {task} takes {needed} text{'s' * (needed > 1)}, and {len(texts)} came")

    def _judged(self, texts: tuple[str, ...], logits: np.ndarray, cut: int) -> Judged:
        names = texts[1:] if self.config.task == "multiple-choice" else self.config.labels
        label = verdict(self.config, logits, texts)
        if self.config.regression:
            return Judged(texts, label, {}, cut)
        powers = np.exp(logits[: len(names)] - logits[: len(names)].max())
        shares = powers / powers.sum()
        return Judged(texts, label, dict(zip(names, shares.tolist(), strict=True)), cut)
