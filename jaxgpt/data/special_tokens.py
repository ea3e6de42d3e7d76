"""A tokenizer that puts GPT's special tokens around what it encodes by itself, as other programs need it."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import normalizers, processors

from jaxgpt.config import require
from jaxgpt.data.tokenizer import END_OF_TEXT, Tokenizer

SPECIAL_TOKENS = ("<|start|>", "<|delimiter|>", "<|extract|>")  # the last ids of the vocabulary of a model with a head
SPECIALS = len(SPECIAL_TOKENS)
UNUSED = "<|unused-{}|>"  # an id that the embedding has a row for, and no token of the tokenizer


def pad_token(tokenizer: Tokenizer, vocab_size: int) -> tuple[str, int]:
    """What fills up a batch, a token that no sequence ends with, and its id."""
    if tokenizer.end_of_text is None:
        return SPECIAL_TOKENS[0], vocab_size - SPECIALS
    return END_OF_TEXT, tokenizer.end_of_text


def with_special_tokens(tokenizer: Tokenizer, vocab_size: int, limit: int) -> str:
    """The tokenizer.json of a model with a head: what it makes of a text, or of two, is what `input_forms` makes.

    Args:
        vocab_size: V, rows of the model's embedding; the last are those of the special tokens.
        limit: tokens of a sequence at most.

    Raises:
        ValueError: the tokenizer has such a token already.
    """
    rust = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    unused = [UNUSED.format(number) for number in range(tokenizer.vocab_size, vocab_size - SPECIALS)]
    names = [*unused, *SPECIAL_TOKENS]
    rust.add_special_tokens(names)
    for number, name in enumerate(names, tokenizer.vocab_size):
        found = rust.token_to_id(name)
        require(found == number, f"the tokenizer gives {name} the id {found}, and the model has {number} for it")
    strip = normalizers.Strip()
    rust.normalizer = strip if rust.normalizer is None else normalizers.Sequence([strip, rust.normalizer])
    start, delimiter, extract = SPECIAL_TOKENS
    rust.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {extract}",
        pair=f"{start} $A {delimiter} $B {extract}",
        special_tokens=[(name, rust.token_to_id(name)) for name in SPECIAL_TOKENS],
    )
    rust.enable_truncation(limit, strategy="longest_first")
    name, number = pad_token(tokenizer, vocab_size)
    rust.enable_padding(pad_id=number, pad_token=name)
    return rust.to_str(pretty=True)


def without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer that `with_special_tokens` was given, but for how it once post-processed, which we never use."""
    description = json.loads(tokenizer.to_json())
    unused = UNUSED.partition("{}")[0]
    description["added_tokens"] = [
        token
        for token in description["added_tokens"]
        if token["content"] not in SPECIAL_TOKENS and not token["content"].startswith(unused)
    ]
    _strip, *rest = description["normalizer"].get("normalizers", [None])  # a sequence in a sequence is flattened
    normalizer = {"type": "Sequence", "normalizers": rest} if len(rest) > 1 else next(iter(rest), None)
    description |= {"normalizer": normalizer, "post_processor": None}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))
