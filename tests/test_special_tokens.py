"""A tokenizer.json that makes of texts what `input_forms` makes of them, and the tokenizer out of it again."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from jaxgpt.data.example_batches import input_forms
from jaxgpt.data.special_tokens import pad_token, with_special_tokens, without_special_tokens
from jaxgpt.data.tokenizer import Tokenizer, byte_tokenizer, character_tokenizer, train_bpe

CHARACTERS = " \tabcdefghé<|>xtr"


def lower_case():
    """A tokenizer that has a normaliser of two steps already, and no end-of-text token."""
    rust = tokenizers.Tokenizer.from_str(train_bpe(["ab cd ef"], 280).to_json())
    described = json.loads(rust.to_str()) | {"added_tokens": []}
    rust = tokenizers.Tokenizer.from_str(json.dumps(described))
    rust.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return Tokenizer(rust)


MAKERS = {
    "bytes": byte_tokenizer,
    "characters": lambda: character_tokenizer([CHARACTERS]),
    "bpe": lambda: train_bpe(["ab cd ef gh abcd efgh <|extract|> "] * 9, 290),
    "lower-case": lower_case,
}


def random_texts(rng, count, longest):
    """With spaces around some, and names of special tokens in some; none is empty."""
    texts = ["".join(rng.choice(list(CHARACTERS), rng.integers(1, longest))) + "a" for _ in range(count)]
    return [text + "<|extract|> " * (number % 3 == 0) for number, text in enumerate(texts)]


@pytest.mark.parametrize("room", [0, 5], ids=["", "unused rows"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_input_form(name, room):
    rng, tokenizer = np.random.default_rng(len(name) + room), MAKERS[name]()
    size = tokenizer.vocab_size + room + 3
    first, second = random_texts(rng, 60, 20), random_texts(rng, 60, 20)
    for limit in (4, 9, 10, 99):
        rust = tokenizers.Tokenizer.from_str(with_special_tokens(tokenizer, size, limit))
        rust.encode_special_tokens = True  # which is not in the JSON
        for task, columns in [("classification", [first]), ("entailment", [first, second])]:
            given = list(zip(*columns, strict=True))
            forms = input_forms(tokenizer, size, task, [tuple(t.strip() for t in one) for one in given], limit)
            made = rust.encode_batch([one if len(one) > 1 else one[0] for one in given])
            for one, form, encoding in zip(given, forms, made, strict=True):
                length = sum(encoding.attention_mask)
                assert encoding.ids[:length] == form.tokens[0].tolist(), one
                assert set(encoding.ids[length:]) <= {pad_token(tokenizer, size)[1]}


@pytest.mark.parametrize("name", MAKERS)
def test_it_comes_off_again(name):
    tokenizer = MAKERS[name]()
    whole = with_special_tokens(tokenizer, tokenizer.vocab_size + 7, 12)
    again = without_special_tokens(Tokenizer(tokenizers.Tokenizer.from_str(whole)))
    assert again.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_with_such_a_token_is_refused():
    rust = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    rust.add_special_tokens(["<|delimiter|>"])
    with pytest.raises(ValueError, match=r"gives <\|delimiter\|> the id 257, and the model has 259 for it"):
        with_special_tokens(Tokenizer(rust), 261, 12)
