"""The public face: load a model, let it write, hand it on. Config, parameters and tokenizer held together."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import jax

from jaxgpt.config import Dtype, GenerationConfig, GPTConfig, Weights, from_dict, require, to_dict
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.environment import use_compilation_cache
from jaxgpt.generation.beam import beam_search
from jaxgpt.generation.decode import Decoder, Text, gpt_decoder
from jaxgpt.generation.draft import Draft
from jaxgpt.generation.text import Writer, write
from jaxgpt.models.blocks import Parameters, compact_parameters, decoding_parameters
from jaxgpt.storage.adapters import write_adapter
from jaxgpt.storage.huggingface import config_to_hf
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.runs import RunFolder
from jaxgpt.storage.weights import export_tensors
from jaxgpt.tasks.classifiers import Tuned, write_classifier
from jaxgpt.tasks.published import check_free, tokenizer_config, write_published
from jaxgpt.tasks.trained import Which, load_adapter, load_pretrained

DEFAULT_NEW_TOKENS = 256
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Generated:
    """What a model wrote."""

    prompt: str
    """what it continues"""
    text: str
    """the new text, without the stop string or stop token that ended it"""
    tokens: tuple[int, ...]
    """ids of the new tokens; the last may have begun a stop string"""
    logprobs: tuple[float, ...]
    """log-probability of each under the model, in nats, whatever the sampling (for beams: as they were scored)"""
    finish_reason: Literal["stop", "length"]
    """stop: a stop token or string came; length: the limit"""


@dataclass(frozen=True)
class LanguageModel:
    """A GPT with its parameters and its tokenizer."""

    config: GPTConfig
    parameters: Parameters = field(repr=False)
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...] = ()
    """ids that end a text unless others are asked for"""
    draft: LanguageModel | None = field(default=None, repr=False)
    """a small model with the same tokens, which guesses ahead for this one; the text is this one's own"""

    def __post_init__(self) -> None:
        draft = self.draft
        if draft is not None and not (
            draft.config.vocab_size == self.config.vocab_size and draft.tokenizer.same_tokens(self.tokenizer)
        ):
            raise ValueError("the draft model has another tokenizer than the model; it can guess only the same tokens")

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return gpt_decoder(self.config)

    @functools.cached_property
    def decoding_parameters(self) -> Parameters:
        """The same parameters laid out for decoding; made when first needed, kept beside `parameters`."""
        # jit copies also what it returns as it is.
        return jax.jit(decoding_parameters)(self.parameters) if "blocks" in self.parameters else self.parameters

    def generate(self, prompt: Prompt, settings: GenerationConfig | None = None, **changes: object) -> Generated:
        """Continue one prompt.

        Args:
            prompt: at least one token of text, or token ids.
            settings: how (default: `GenerationConfig()`).
            changes: fields of `GenerationConfig` to change, such as `max_new_tokens=40, temperature=0`.

        Raises:
            ValueError: an empty prompt, a character that the tokenizer does not have, an id outside the vocabulary, a
                setting out of range, or, unless `truncate` is "left", prompt and new tokens beyond the context.
            FloatingPointError: the model's logits are NaN.
        """
        settings = _settings(settings, changes)
        if settings.samples > 1:
            raise ValueError(f"samples is {settings.samples}; generate_batch returns several texts a prompt")
        return self.generate_batch([prompt], settings)[0]

    def generate_batch(
        self, prompts: Sequence[Prompt], settings: GenerationConfig | None = None, **changes: object
    ) -> list[Generated]:
        """Continue several prompts at once, each as it would be alone: `samples` texts for the first, and so on.

        Arguments and errors as in `generate`.
        """
        settings = _settings(settings, changes)
        if isinstance(prompts, str):
            raise ValueError("generate_batch takes a list of prompts; generate takes one")
        if not prompts:
            return []
        encoded = [self._encode(prompt) for prompt in prompts]
        limits = [self._limit(ids, settings) for ids in encoded]
        if settings.beams > 1:
            return self._beam_search(prompts, encoded, limits, settings)
        texts = [
            Text(list(ids), len(ids), limit, sample)
            for ids, limit in zip(encoded, limits, strict=True)
            for sample in range(settings.samples)
        ]
        pieces = [""] * len(texts)
        for gained in self._write(texts, settings):
            pieces = [text + piece for text, piece in zip(pieces, gained, strict=True)]
        return [
            Generated(self._spelled(prompt), piece, tuple(text.new), tuple(text.logprobs), text.finish or "length")
            for prompt, text, piece in zip(
                (p for p in prompts for _ in range(settings.samples)), texts, pieces, strict=True
            )
        ]

    def stream(self, prompt: Prompt, settings: GenerationConfig | None = None, **changes: object) -> Iterator[str]:
        """Yield the new text in pieces as it is made, never half a character. Arguments and errors as in `generate`."""
        settings = _settings(settings, changes)
        if settings.samples > 1 or settings.beams > 1:
            raise ValueError("one text can be streamed: samples and beams must be 1")
        ids = self._encode(prompt)
        texts = [Text(ids, len(ids), self._limit(ids, settings))]
        return (piece for (piece,) in self._write(texts, settings) if piece)

    def _write(self, texts: list[Text], settings: GenerationConfig) -> Iterator[list[str]]:
        stops, draft, guesser = self._stop_tokens(settings), self.draft, None
        if draft is not None:
            if settings.lookup:
                raise ValueError(f"lookup is {settings.lookup}, and there is a draft model; one of them guesses ahead")
            guesser = Draft(draft._decoder, draft.decoding_parameters, settings, stops)
        steps = self._decoder.decode(self.decoding_parameters, texts, settings, stops, guesser)
        return write(steps, texts, [Writer(self.tokenizer, settings.stop) for _ in texts])

    def _beam_search(
        self, prompts: Sequence[Prompt], encoded: list[list[int]], limits: list[int], settings: GenerationConfig
    ) -> list[Generated]:
        if self.draft is not None:
            raise ValueError("a draft model has no meaning with beams")
        if settings.stop:
            raise ValueError("stop strings have no meaning with beams; stop tokens end a beam")
        stops = self._stop_tokens(settings)
        found = beam_search(self._decoder, self.decoding_parameters, encoded, limits, settings, stops)
        generated = []
        for prompt, beams in zip(prompts, found, strict=True):
            for beam in beams:
                ended = beam.tokens[-1] in stops
                tokens = beam.tokens[:-1] if ended else beam.tokens
                text, logprobs = self.tokenizer.decode(tokens), beam.logprobs[: len(tokens)]
                generated.append(
                    Generated(self._spelled(prompt), text, tokens, logprobs, "stop" if ended else "length")
                )
        return generated

    def _spelled(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _stop_tokens(self, settings: GenerationConfig) -> tuple[int, ...]:
        stops = self.stop_tokens if settings.stop_tokens is None else settings.stop_tokens
        self._check_ids(stops, "stop-tokens")
        return stops

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, bytes):
            raise ValueError("the prompt is bytes; it must be text, or token ids")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise ValueError("the prompt is empty; generation needs at least one token to continue")
        self._check_ids(ids, "the prompt")
        return ids

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        size = self.config.vocab_size or self.tokenizer.vocab_size
        wrong = [token for token in ids if not 0 <= token < size]
        if wrong:
            raise ValueError(f"{what} has the token id {wrong[0]}, outside the vocabulary of {size}")

    def _limit(self, ids: list[int], settings: GenerationConfig) -> int:
        """How many tokens may follow a prompt."""
        room, wanted = self.config.context - len(ids), settings.max_new_tokens
        if settings.truncate == "left":
            return wanted or DEFAULT_NEW_TOKENS
        limit = max(1, min(DEFAULT_NEW_TOKENS, room)) if wanted is None else wanted
        if limit > room:
            raise ValueError(
                f"{len(ids)} prompt tokens and {limit} new ones are {limit - room} more than the context of "
                f"{self.config.context}; ask for fewer, or --truncate left to drop the oldest"
            )
        return limit


def _settings(settings: GenerationConfig | None, changes: dict[str, object]) -> GenerationConfig:
    if isinstance(changes.get("stop"), str):
        changes = changes | {"stop": (changes["stop"],)}
    return from_dict(GenerationConfig, to_dict(settings or GenerationConfig()) | changes)


def load(
    path: str | os.PathLike[str],
    *,
    checkpoint: Which | None = None,
    revision: str | None = None,
    dtype: Dtype | None = None,
    base: str | None = None,
    weights: Weights | None = None,
    draft: str | os.PathLike[str] | None = None,
) -> LanguageModel:
    """Load a model: a run folder, a Hugging Face folder, or a name on the Hugging Face hub.

    Args:
        path: what `train` wrote; or a folder with config.json, model.safetensors (or shards and their index) and a
            tokenizer; or a name such as gpt2, distilgpt2, openai-community/gpt2-xl, OWNER/FINE-TUNE.
        checkpoint: of a run: "best", the one with the lowest held-out loss, "last", the newest, or "average", the mean
            of the newest (default: that if the run was to average several, else best).
        revision: of a name on the hub: a commit, tag or branch (default: main).
        dtype: what the parameters become, and what is computed in (default: a run's own; float32 for other models,
            whatever their files hold).
        base: of a run that trained adapters or a part of the layers alone, where the model it began with lies now.
        weights: keep the matrices in fewer bits, upcast where they are used: "int8" or "bfloat16" (see
            `models.compact`). On CPU single tokens come faster; such a model cannot be exported.
        draft: a small model with the same tokenizer, which guesses ahead; kept as `weights` and `dtype` say, too.

    Raises:
        FileNotFoundError: no such folder or name, a file of it is missing, or the hub cannot be reached.
        ValueError: a choice that there is not, a damaged file, an architecture that is not here, or a setting it cannot
            express, named; a draft with another tokenizer.
    """
    named = {"checkpoint": (checkpoint, Which), "dtype": (dtype, Dtype), "weights": (weights, Weights)}
    for name, (value, choices) in named.items():
        known = get_args(choices)
        require(value is None or value in known, f"{name} is {value!r}; it must be one of {', '.join(known)}")
    use_compilation_cache()
    found = load_pretrained(path, checkpoint, revision, dtype, base)
    parameters = found.parameters
    if weights is not None:
        parameters = jax.jit(compact_parameters, static_argnums=1)(parameters, weights)
    guessing = None if draft is None else load(draft, dtype=dtype, weights=weights)
    return LanguageModel(found.config, parameters, found.tokenizer, found.stop_tokens, guessing)


def export(model: LanguageModel | Tuned, folder: str | os.PathLike[str]) -> None:
    """Write a model, or a `Classifier`, with its tokenizer as a folder for the `from_pretrained` of `transformers`.

    What comes back from `load` (or from `Classifier`) is the same, bit for bit.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: a setting or a task that the format cannot express, named; weights in fewer bits.
    """
    if not isinstance(model, LanguageModel):
        write_classifier(model, Path(folder))
        return
    if "blocks" not in model.parameters:
        raise ValueError("the parameters are laid out for decoding; what is exported is loaded without weights")
    config, tokenizer = model.config, model.tokenizer
    end, stops = tokenizer.end_of_text, list(model.stop_tokens)
    files = {
        "config.json": config_to_hf(config, end),  # refuses before anything is written
        "generation_config.json": {"bos_token_id": end, "eos_token_id": stops[0] if len(stops) == 1 else stops or None},
        "tokenizer_config.json": tokenizer_config(tokenizer, config.context),
    }
    tensors = export_tensors(config, by_path(model.parameters))
    write_published(Path(folder), tensors, tokenizer.to_json(pretty=True), files)


def export_adapter(
    run: str | os.PathLike[str], folder: str | os.PathLike[str], *, checkpoint: Which | None = None
) -> None:
    """Write the adapter alone that a run with `adapt.method` lora trained, as PEFT's `from_pretrained` reads it.

    `load` takes that folder too, if the model it belongs to is where it was.

    Raises:
        FileExistsError: the folder exists and is not empty.
        FileNotFoundError, ValueError: no such run, or one that trained no adapter.
    """
    adapt, adapter, base, digest = load_adapter(RunFolder.at(run), checkpoint)
    check_free(Path(folder))
    write_adapter(Path(folder), adapt, by_path(adapter), base, digest)
