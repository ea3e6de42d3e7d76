"""Tokenizers: text comes back as it went in, nothing is dropped silently, and no text becomes a special token."""

import itertools
import json
import random
import re

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from jaxgpt.data import tokenizer as module
from jaxgpt.data.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    byte_tokenizer,
    character_tokenizer,
    load_tokenizer,
    train_bpe,
)

PROSE = ["def add(a, b):\n    return a + b\n" * 20, "a sentence, and another sentence; café 😀\n" * 20]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(PROSE, 280)


def random_texts(seed: int, count: int = 200) -> list[str]:
    """Strings of every kind of character but surrogates, special tokens and odd newlines among them."""
    rng = random.Random(seed)
    planes = [(0, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x4E00, 0x4EFF), (0xE000, 0xFFFF), (0x1F300, 0x10FFFF)]
    fixed = [END_OF_TEXT, "<|unknown|>", "\r\n", "\ufeff", " ", "\ufffd", "e\u0301"]

    def piece() -> str:
        return rng.choice(fixed) if rng.random() < 0.2 else chr(rng.randint(*rng.choice(planes)))

    return ["".join(piece() for _ in range(rng.randrange(30))) for _ in range(count)]


def same_ids(ours: Tokenizer, theirs: Tokenizer, texts: list[str]) -> bool:
    pairs = zip(ours.encode_batch(texts), theirs.encode_batch(texts), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_bytes_are_their_own_ids():
    tokenizer = byte_tokenizer()
    for text in random_texts(0):
        assert tokenizer.encode(text) == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


def test_what_is_encoded_decodes_to_itself(bpe):
    texts = random_texts(1)
    for tokenizer in (byte_tokenizer(), bpe, character_tokenizer(texts)):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert tokenizer.decode(ids.tolist()) == text
            assert tokenizer.encode(text) == ids.tolist()


def test_text_never_becomes_a_special_token(bpe, tmp_path):
    text = f"before {END_OF_TEXT} after <|unknown|>"
    characters = character_tokenizer([text], "token")
    kinds = [byte_tokenizer(), bpe, character_tokenizer([text]), characters]
    for number, tokenizer in enumerate(kinds):
        tokenizer.save(tmp_path / f"{number}.json")
    for tokenizer in (*kinds, *(load_tokenizer(path) for path in tmp_path.iterdir())):
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text
    # Spelled-out special tokens are characters like any others.
    assert len(characters.encode(text)) == len(text)


def test_end_of_text_has_the_last_id(bpe):
    for tokenizer in (byte_tokenizer(), bpe, character_tokenizer(PROSE), character_tokenizer(PROSE, "token")):
        assert tokenizer.end_of_text == tokenizer.vocab_size - 1


def test_characters_are_numbered_in_order():
    rng = np.random.default_rng(2)
    text = "".join(map(chr, rng.integers(0x20, 0x3000, 500)))
    alphabet = sorted(set(text))
    tokenizer = character_tokenizer([text[:200], text[200:]])
    assert tokenizer.encode(text) == [alphabet.index(character) for character in text]
    assert tokenizer.vocab_size == len(alphabet) + 1


def test_an_unknown_character_is_named_also_after_loading(tmp_path):
    tokenizer = character_tokenizer(["abc\n"])
    tokenizer.save(tmp_path / "tokenizer.json")
    for either in (tokenizer, load_tokenizer(tmp_path)):
        with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 2"):
            either.encode("abé")
        with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 0"):
            either.encode_batch(["abc", "é"])


def test_an_unknown_character_becomes_the_unknown_token_on_request(tmp_path):
    tokenizer = character_tokenizer(["abc"], "token")
    tokenizer.save(tmp_path / "tokenizer.json")
    for either in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json")):
        assert either.encode("aéb漢") == [0, 3, 1, 3]
        assert either.end_of_text == 4


def test_a_lone_surrogate_is_refused(bpe):
    for tokenizer in (byte_tokenizer(), bpe, character_tokenizer(["ab"], "token")):
        with pytest.raises(ValueError, match=r"lone surrogate, U\+D83D, at position 1"):
            tokenizer.encode("a\ud83d")


def test_saving_and_loading_changes_nothing(bpe, tmp_path):
    texts = random_texts(3)
    for number, tokenizer in enumerate((byte_tokenizer(), bpe, character_tokenizer(texts))):
        path = tmp_path / f"{number}.json"
        tokenizer.save(path)
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
        assert same_ids(loaded, tokenizer, texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "2.json"]


def test_different_tokenizers_have_different_fingerprints(bpe):
    kinds = [byte_tokenizer(), bpe, train_bpe(PROSE, 270), character_tokenizer(["ab"]), character_tokenizer(["ac"])]
    assert len({kind.fingerprint for kind in kinds}) == len(kinds)
    assert train_bpe(PROSE, 280).fingerprint == bpe.fingerprint


def spaced_texts(seed: int) -> list[str]:
    """Long texts with runs of every kind of space, in which a cut at the wrong place would change the words."""
    rng = random.Random(seed)
    pieces = [
        *"ab1'.é漢😀\u0301",
        "'s",
        "'ll",
        "\r\n",
        *" \n\n\t\r\x0b\x1c\x85\xa0\u2003\u3000",
        "  ",
        END_OF_TEXT,
        "  b",
    ]
    return ["".join(rng.choices(pieces, k=rng.randrange(2000))) for _ in range(20)]


def test_a_long_text_has_the_ids_it_has_in_one_piece(monkeypatch, tmp_path):
    texts = ["", *spaced_texts(8)]
    bpe = train_bpe([*texts, *PROSE], 400)
    bpe.save(tmp_path / "tokenizer.json")
    for tokenizer in (byte_tokenizer(), bpe, load_tokenizer(tmp_path), character_tokenizer(texts)):
        whole = [tokenizer.encode(text) for text in texts]
        for piece, at_once in [(1, 1), (7, 50), (100, 10**6)]:
            with monkeypatch.context() as patch:
                patch.setattr(module, "PIECE", piece)
                patch.setattr(module, "CHARACTERS_AT_ONCE", at_once)
                assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == whole


def test_a_long_text_is_given_to_the_library_in_pieces(bpe, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 50)
    for tokenizer in (byte_tokenizer(), bpe, character_tokenizer(PROSE)):
        pieces = list(module._pieces(PROSE[0], tokenizer._cut))
        assert "".join(pieces) == PROSE[0]
        assert max(map(len, pieces)) < 70


def test_training_on_a_long_text_does_not_depend_on_the_pieces(monkeypatch):
    texts = spaced_texts(9)
    whole = train_bpe(texts, 400)
    monkeypatch.setattr(module, "PIECE", 10)
    assert train_bpe(texts, 400).fingerprint == whole.fingerprint


@pytest.mark.parametrize("changed", ["added", "normalizer", "prefix", "pre_tokenizer", "suffix"])
def test_a_tokenizer_whose_words_cross_spaces_gets_the_text_whole(bpe, changed, monkeypatch, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    rust = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if changed == "added":
        rust.add_tokens([AddedToken("a b", normalized=False)])
    elif changed == "normalizer":
        rust.normalizer = normalizers.Prepend("_")
    elif changed == "prefix":
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif changed == "pre_tokenizer":
        rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel()])
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {name: i for i, name in enumerate([*alphabet, *(character + "$" for character in alphabet)])}
        rust = tokenizers.Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="$"))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rust.add_special_tokens([END_OF_TEXT])
    text = "a b a b  c a\nb a b"
    tokenizer = Tokenizer(rust)
    whole = tokenizer.encode(text)
    monkeypatch.setattr(module, "PIECE", 1)
    assert tokenizer.encode(text) == whole


def test_a_byte_that_a_vocabulary_lacks_is_named(tmp_path):
    names = {character: i for i, character in enumerate("abc")}
    rust = tokenizers.Tokenizer(models.BPE(names, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.add_special_tokens([END_OF_TEXT])
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("cab") == [2, 0, 1]
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 2"):
        tokenizer.encode("abéc")


def test_a_trained_bpe_has_the_size_asked_for_or_what_the_text_yields(bpe):
    assert bpe.vocab_size == 280
    assert train_bpe(["aa"], 4096).vocab_size < 260
    assert train_bpe(PROSE, 257).vocab_size == 257
    assert len(bpe.encode(PROSE[0])) < len(PROSE[0].encode())


def test_a_stream_is_the_text_in_whole_characters(bpe):
    rng = random.Random(4)
    for tokenizer in (byte_tokenizer(), bpe):
        for text in random_texts(5, 60):
            pieces = list(tokenizer.stream(tokenizer.encode(text)))
            assert "".join(pieces) == text
            # U+FFFD in a piece stands in the text too: a half character would have shown as one.
            assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
        for _ in range(200):  # ids that are no text, as an untrained model makes them
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(20))]
            assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_a_stream_gives_a_character_as_soon_as_it_is_whole():
    asked: list[int] = []

    def ids():
        for token in "aé😀".encode():
            asked.append(token)
            yield token

    seen = [(piece, len(asked)) for piece in byte_tokenizer().stream(ids())]
    assert seen == [("a", 1), ("é", 3), ("😀", 7)]


def test_what_a_file_from_elsewhere_adds_or_cuts_is_left_out(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.add_special_tokens([END_OF_TEXT])
    plain = tmp_path / "plain.json"
    rust.save(str(plain))
    rust.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 256)]
    )
    rust.enable_truncation(5)
    rust.enable_padding(length=64)
    rust.save(str(tmp_path / "decorated.json"))
    texts = ["a", "a text of more than five tokens", ""]
    assert same_ids(load_tokenizer(plain), load_tokenizer(tmp_path / "decorated.json"), texts)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model":{"type":"BPE"}}', b'{"model":{"type":"Nope"}}', b"null"],
)
def test_a_file_that_is_no_tokenizer_is_named(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(path)


def test_a_cut_or_altered_file_is_refused_or_loads(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    whole, rng = path.read_bytes(), random.Random(6)
    for cut in rng.sample(range(len(whole) - 2), 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            load_tokenizer(path)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            load_tokenizer(path)
        except ValueError as error:
            assert "tokenizer.json" in str(error)  # noqa: PT017  (not every altered byte does harm)


def test_a_tokenizer_without_end_of_text_separates_no_documents(tmp_path):
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_text is None and tokenizer.encode("aa") == [0, 0]
    with pytest.raises(ValueError, match="endoftext"):
        _ = tokenizer.separator


def test_special_tokens_only_on_request(bpe):
    text = "one<|endoftext|>two<|endoftext|>"
    plain, special = bpe.encode(text), bpe.encode(text, special_tokens=True)
    assert bpe.end_of_text not in plain and bpe.decode(plain) == text
    end = [bpe.end_of_text]
    assert special == bpe.encode("one") + end + bpe.encode("two") + end
    assert bpe.encode("none here", special_tokens=True) == bpe.encode("none here")


def write_first_gpt_files(folder):
    """A vocabulary in the manner of the first GPT: words end in </w>, all lower case."""
    letters = "abcdefghijklmnopqrstuvwxyz'.,!"
    pairs = [("t", "h"), ("th", "e</w>"), ("a", "n"), ("an", "d</w>")]
    names = ["<unk>", *letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))


def test_the_first_gpts_vocabulary_lower_cases_and_ends_words(tmp_path):
    write_first_gpt_files(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("The AND the") == tokenizer.encode("the and the")
    assert len(tokenizer.encode("The AND the")) == 3
    assert tokenizer.decode(tokenizer.encode("The cat, and the dog!")) == "the cat , and the dog !"
    assert tokenizer.encode("7") == [0], "what is unknown is the unknown token"


def test_added_tokens_follow_the_vocabulary(tmp_path, bpe):
    bpe.save(tmp_path / "tokenizer.json")
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    vocabulary, merges = description["model"]["vocab"], description["model"]["merges"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": len(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges))
    size = load_tokenizer(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size, "<|im_end|>": size + 1}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.encode("a<pad>", special_tokens=True) == [*tokenizer.encode("a"), size]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size + 7}))
    with pytest.raises(ValueError, match="gives <pad> the id"):
        load_tokenizer(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")


def test_gpt2_files(shared_data, tmp_path):
    ours = load_tokenizer(shared_data / "gpt2")
    assert (ours.vocab_size, ours.end_of_text) == (50257, 50256)
    assert ours.encode("Hello, world") == [15496, 11, 995]
    for text in itertools.chain(PROSE, random_texts(7)):
        assert ours.decode(ours.encode(text)) == text
    ours.save(tmp_path / "tokenizer.json")
    assert same_ids(load_tokenizer(tmp_path), ours, PROSE)


def test_gpt2_ids_are_those_of_its_merges_one_after_another(shared_data):
    folder = shared_data / "gpt2"
    ours = load_tokenizer(folder)
    vocabulary = json.loads(next(p for p in (folder / "vocab.json", folder / "encoder.json") if p.exists()).read_text())
    merges = next(p for p in (folder / "merges.txt", folder / "vocab.bpe") if p.exists()).read_text("utf-8").split("\n")
    ranks = {tuple(line.split()): rank for rank, line in enumerate(merges[1:]) if line}

    def ids(word: str) -> list[int]:
        parts = list(word.replace(" ", "Ġ").replace("\n", "Ċ"))
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            first, second = min(pairs, key=ranks.__getitem__)
            place = next(i for i, pair in enumerate(itertools.pairwise(parts)) if pair == (first, second))
            parts[place : place + 2] = [first + second]
        return [vocabulary[part] for part in parts]

    words = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+")  # section 2.2
    text = "Hello, how are you? I'm fine: it's 1959,\n\n  and   they'll be back... (unbelievably)\n"
    assert ours.encode(text) == [number for word in words.findall(text) for number in ids(word)]
    assert ours.encode("Hello, how are you?") == [15496, 11, 703, 389, 345, 30]
