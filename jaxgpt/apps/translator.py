"""A translator: sentences in, translations out, in order, from a run of `python train.py translate` or one's own."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxgpt.config import Dtype, GenerationConfig, TranslationConfig
from jaxgpt.data.pairs import read_pairs
from jaxgpt.environment import use_compilation_cache
from jaxgpt.generation.decode import Decoder
from jaxgpt.generation.translate import translate_tokens, translation_decoder
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.transformer import attention_map, decoding_parameters
from jaxgpt.storage.runs import RunFolder
from jaxgpt.tasks.scores import exact_match
from jaxgpt.tasks.trained import Which, load_trained

# The paper's own (Vaswani et al. 2017, section 6.1). Not ended by the first translations that are complete: with a sure
# model those are short and unlikely ones, made while the likely one is still growing.
SETTINGS = GenerationConfig(beams=4, length_rule="wu", length_penalty=0.6)
BATCHES_AT_ONCE = 8  # of which each has sentences of about the same length


@dataclass(frozen=True)
class TranslationScores:
    """How near translations came to their references."""

    bleu: float
    chrf: float
    exact_match: float
    """share that are the reference, but for spacing"""
    sentences: int
    cut: int
    """sources that were too long for the model, of which it read the beginning"""
    seconds: float
    """of the translating, compilation included"""
    signature: str
    """how sacrebleu computed BLEU"""


@dataclass(frozen=True)
class Hypothesis:
    """A translation that the search found."""

    text: str
    score: float
    """log-probability in nats, divided as the length rule says"""


@dataclass(frozen=True)
class Translated:
    """A sentence and what became of it."""

    source: str
    text: str
    """the best translation; empty where the source is"""
    hypotheses: tuple[Hypothesis, ...]
    """the best ones found, each text once, best first"""
    cut: int = 0
    """tokens at the end of the source that were beyond the limit, and are not translated"""


class Translator:
    """An encoder-decoder with its tokenizer."""

    def __init__(
        self, model: str | os.PathLike[str], *, checkpoint: Which | None = None, dtype: Dtype | None = None
    ) -> None:
        """Load a translation run.

        Args:
            model: the run folder.
            checkpoint: which, see `tasks.trained.load_trained`.
            dtype: what is computed in (default: the run's own).

        Raises:
            FileNotFoundError: there is no run, or no checkpoint in it yet.
            ValueError: a run of another task, or a damaged file.
        """
        use_compilation_cache()
        run = RunFolder.at(model)
        trained = load_trained(run, TranslationConfig, checkpoint, dtype)
        self.config, self.tokenizer = trained.config.model, trained.tokenizer
        self.parameters: Parameters = trained.parameters

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return translation_decoder(self.config, self.tokenizer.separator)

    @functools.cached_property
    def _decoding_parameters(self) -> Parameters:
        return jax.jit(decoding_parameters)(self.parameters)

    @property
    def max_source(self) -> int:
        """Most tokens of a source: the context less the end token."""
        return self.config.context - 1

    def translate(self, sentence: str, settings: GenerationConfig = SETTINGS) -> str:
        """Translate one sentence."""
        (translated,) = self.translate_batch([sentence], settings)
        return translated.text

    def translate_batch(
        self, sentences: Iterable[str], settings: GenerationConfig = SETTINGS, *, batch_size: int = 64
    ) -> list[Translated]:
        """Translate sentences, each as it would be alone; the results are in their order.

        Of the settings those count that are about beams, their length and their number.

        Raises:
            ValueError: one string instead of several, a sentence with a lone surrogate, which is no character, or more
                samples than beams.
            FloatingPointError: the model's logits are NaN.
        """
        if isinstance(sentences, str):
            raise ValueError("translate_batch takes several sentences; translate takes one")
        texts = list(sentences)
        encoded = [ids.tolist() for ids in self.tokenizer.encode_batch(texts)]
        wanted = [number for number, text in enumerate(texts) if text.strip()]
        sources = [encoded[number][: self.max_source] for number in wanted]
        end = self.tokenizer.separator
        found = translate_tokens(self._decoder, self._decoding_parameters, sources, settings, end, batch_size)
        results = [Translated(text, "", ()) for text in texts]
        for number, beams in zip(wanted, found, strict=True):
            spelled: dict[str, Hypothesis] = {}
            for beam in beams:  # different tokens may spell the same
                text = self._spelled(beam.tokens)
                spelled.setdefault(text, Hypothesis(text, beam.score))
            hypotheses = tuple(spelled.values())
            cut = max(0, len(encoded[number]) - self.max_source)
            results[number] = Translated(texts[number], hypotheses[0].text, hypotheses, cut)
        return results

    def stream(
        self,
        lines: Iterable[str],
        settings: GenerationConfig = SETTINGS,
        *,
        batch_size: int = 64,
        ready: Callable[[], bool] = lambda: True,
    ) -> Iterator[Translated]:
        """Translate lines as they come, in their order, many at once.

        `ready` says whether the next line is there already: until it is, no line that is waits for more.
        """
        lines = iter(lines)
        for first in lines:
            chunk = [first]
            while len(chunk) < batch_size * BATCHES_AT_ONCE and ready():
                following = list(itertools.islice(lines, 1))
                if not following:
                    break
                chunk += following
            yield from self.translate_batch(chunk, settings, batch_size=batch_size)

    def attention(self, source: str, translation: str) -> tuple[Float[np.ndarray, "T S"], list[str], list[str]]:
        """How much each token of a translation looks at each of its source, in the model that made it.

        Returns:
            The weights, the mean over the heads of the decoder's last layer but one (the last one looks at less of
            what it says), rows adding up to 1; the source's tokens; the translation's. Both end with the end token.
        """
        end = self.tokenizer.separator
        sides = [self.tokenizer.encode(text)[: self.max_source] for text in (source, translation)]
        read, said = [*sides[0], end], [end, *sides[1]]
        weights = attention_map(self.config, self.parameters, jnp.array(read), jnp.array(said))
        layer = max(0, weights.shape[0] - 2)
        names = [[*map(self._name, side), "end"] for side in sides]
        return np.asarray(weights[layer].mean(axis=0)), names[0], names[1]

    def _name(self, token: int) -> str:
        return self.tokenizer.decode([token]).strip() or "·"

    def _spelled(self, tokens: tuple[int, ...]) -> str:
        """The text of a translation: one line, whatever the model says."""
        said = [token for token in tokens if token != self.tokenizer.separator]
        return " ".join(self.tokenizer.decode(said).splitlines()).strip()


def evaluate(
    translator: Translator,
    source: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    settings: GenerationConfig = SETTINGS,
    *,
    tokenize: str = "13a",
    batch_size: int = 64,
) -> TranslationScores:
    """Translate a text file and compare with its reference, line by line, as `sacrebleu` does.

    Args:
        tokenize: how sacrebleu finds words ("none": they are spaced already).

    Raises:
        FileNotFoundError, ValueError: a file that is absent, not UTF-8, or not as long as the other; no sacrebleu.
        FloatingPointError: the model's logits are NaN.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ValueError("BLEU and chrF need the extra: pip install 'jaxgpt[eval]'") from error
    pairs = read_pairs((os.fspath(source), os.fspath(reference)), "", "", "source and reference")
    start = time.monotonic()
    translated = translator.translate_batch([pair[0] for pair in pairs], settings, batch_size=batch_size)
    seconds = time.monotonic() - start
    texts, references = [result.text for result in translated], [pair[1] for pair in pairs]
    bleu, chrf = BLEU(tokenize=tokenize), CHRF()
    return TranslationScores(
        bleu.corpus_score(texts, [references]).score,
        chrf.corpus_score(texts, [references]).score,
        exact_match(texts, references),
        len(pairs),
        sum(result.cut > 0 for result in translated),
        seconds,
        str(bleu.get_signature()),
    )
