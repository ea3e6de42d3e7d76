"""Text: what a reader gets is the decoded text up to the first stop string, whole characters, never taken back."""

import numpy as np
import pytest

from jaxgpt.data.tokenizer import byte_tokenizer, train_bpe
from jaxgpt.generation.decode import Text
from jaxgpt.generation.text import Writer, write

BYTES = byte_tokenizer()
ALPHABET = ["a", "b", "ab", " ", "\n", "é", "ß", "漢", "😀", "👩‍🚀", "a\u0301", "\ufffd", "\x00"]
BPE = train_bpe(["ab ab aab 😀😀 漢 é abba\n" * 20], 300)


def random_text(random, length):
    return "".join(ALPHABET[place] for place in random.integers(0, len(ALPHABET), length))


def random_stops(random, text, count):
    """Some that are in the text, some that only begin as it does, some that are nowhere."""
    stops = []
    for _ in range(count):
        start = random.integers(0, max(1, len(text)))
        stop = text[start : start + random.integers(1, 5)] + random.choice(["", "", "Q", "a"])
        stops.append(stop or "b")
    return stops


def up_to_the_first_stop(text, stops):
    """The text before the stop string that is whole first, the longest of those that are; and whether there is one."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def pushed(writer, tokens, random):
    """All pieces of the tokens given in groups of any size, as a decoder with guesses gives them."""
    pieces, start = [], 0
    while start < len(tokens):
        size = random.integers(0, 4)
        pieces.append(writer.push(tokens[start : start + size]))
        start += size
    return [*pieces, writer.rest()]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_the_pieces_are_the_text_up_to_the_first_stop_string(tokenizer):
    random, stopped = np.random.default_rng(0), 0
    for _ in range(400):
        text = random_text(random, random.integers(0, 25))
        # One string is enough, or several of which none is inside of another.
        stops = random_stops(random, text, random.integers(0, 4))
        stops = [stop for stop in stops if not any(stop in other for other in stops if other != stop)]
        tokens = tokenizer.encode(text)
        writer = Writer(tokenizer, stops)
        pieces = pushed(writer, tokens, random)
        expected, ends = up_to_the_first_stop(text, stops)
        assert "".join(pieces) == expected
        assert writer.stopped == ends
        stopped += ends
    assert 50 < stopped < 350


def test_bytes_that_are_no_characters_come_out_as_decoded():
    random, replaced = np.random.default_rng(1), 0
    for _ in range(400):
        data = bytearray(random_text(random, 12).encode())
        for _ in range(random.integers(0, 4)):  # damage
            place = random.integers(0, len(data))
            data[place : place + random.integers(0, 2)] = bytes(random.integers(0, 256, random.integers(0, 3)).tolist())
        whole = BYTES.decode(data)
        assert whole == bytes(data).decode(errors="replace")
        stops = [str(random.choice(["Q", "ab", "😀", "é\n"]))]
        writer = Writer(BYTES, stops)
        pieces = pushed(writer, list(data), random)
        assert "".join(pieces) == up_to_the_first_stop(whole, stops)[0]
        replaced += "\ufffd" in whole
    assert replaced > 100


def test_a_piece_is_never_half_a_character_and_comes_at_once():
    """Without stop strings nothing waits but bytes that are not a character yet."""
    for character in ["a", "é", "漢", "😀"]:
        writer = Writer(BYTES)
        *first, last = character.encode()
        assert [writer.push([byte]) for byte in first] == [""] * len(first)
        assert writer.push([last]) == character
    random = np.random.default_rng(2)
    for _ in range(50):
        text = random_text(random, 20).replace("\ufffd", "")
        writer, given = Writer(BYTES, ["abQ"]), ""
        for byte in text.encode():
            piece = writer.push([byte])
            assert "\ufffd" not in piece
            given += piece
            assert text.startswith(given)
        assert given + writer.rest() == text


def test_only_what_may_begin_a_stop_string_is_held_back():
    writer = Writer(BYTES, ["abab!", "ba?"])
    given = ""
    for count, byte in enumerate(b"xaabababzb", 1):
        given += writer.push([byte])
        seen = "xaabababzb"[:count]
        longest = max(
            size for size in range(count + 1) if any(stop[:size] == seen[count - size :] for stop in ("abab!", "ba?"))
        )
        assert given == seen[: count - longest]
    assert writer.rest() == "b"


def test_tokens_are_taken_up_to_the_one_that_completes_a_stop_string():
    random = np.random.default_rng(3)
    for _ in range(100):
        text = "".join(random.choice(list("ab")) for _ in range(30))
        stop = "".join(random.choice(list("ab")) for _ in range(random.integers(1, 6)))
        writer = Writer(BYTES, [stop])
        given = "".join(pushed(writer, BYTES.encode(text), random))
        place = text.find(stop)
        assert writer.stopped == (place >= 0)
        assert writer.taken == (place + len(stop) if writer.stopped else 30)
        assert given == (text[:place] if writer.stopped else text)
        assert writer.push([97]) == "" or not writer.stopped


def test_special_tokens_are_no_text():
    writer = Writer(BYTES, ["ab"])
    tokens = [*b"xa", BYTES.separator, *b"yz"]
    assert "".join(pushed(writer, tokens, np.random.default_rng(0))) == BYTES.decode(tokens) == "xayz"


def steps(texts, streams, random, ends=()):
    """What `Decoder.decode` does to texts, with tokens that are known: some each step, until each has ended."""
    while any(text.finish is None for text in texts):
        for number, (text, stream) in enumerate(zip(texts, streams, strict=True)):
            for _ in range(random.integers(1, 4)):
                if text.finish is None:
                    place = len(text.new)
                    text.tokens.append(stream[place])
                    text.logprobs.append(-float(place))
                    if place + 1 == len(stream):
                        text.finish = "stop" if number in ends else "length"
        yield


def test_write_ends_texts_and_trims_tokens_and_logprobs():
    random = np.random.default_rng(4)
    finishes = set()
    for _ in range(60):
        # A replacement character that is really in the text is known as such only once the next character has come.
        whole = [random_text(random, random.integers(1, 20)).replace("\ufffd", "?") for _ in range(4)]
        stops = [random_stops(random, text, 1) for text in whole]
        streams = [BYTES.encode(text) for text in whole]
        texts = [Text([7] * (1 + number), 1 + number, 99) for number in range(4)]
        writers = [Writer(BYTES, stop) for stop in stops]
        given = [""] * 4
        for gained in write(steps(texts, streams, random, ends=(2, 3)), texts, writers):
            given = [before + piece for before, piece in zip(given, gained, strict=True)]
        for number, (text, writer) in enumerate(zip(texts, writers, strict=True)):
            expected, stopped = up_to_the_first_stop(whole[number], stops[number])
            assert given[number] == expected
            assert text.finish == ("stop" if stopped or number in (2, 3) else "length")
            assert text.tokens == [7] * (1 + number) + streams[number][: writer.taken]
            assert text.logprobs == [-float(place) for place in range(writer.taken)]
            kept = BYTES.decode(text.new)
            assert kept.endswith(tuple(stops[number])) if stopped else kept == whole[number]
            finishes.add((stopped, text.finish))
    assert finishes == {(True, "stop"), (False, "stop"), (False, "length")}


def test_the_cut_does_not_depend_on_how_the_text_came():
    """Of stop strings inside of one another the first that is whole counts, however many characters come at once."""
    for text, stops, expected in [("xabcd!", ["abcd", "bc"], "xa"), ("xabcd!", ["abc", "bc"], "x")]:
        for tokenizer in (BYTES, train_bpe([text * 50], 270)):
            writer = Writer(tokenizer, stops)
            assert writer.push(tokenizer.encode(text)) + writer.rest() == expected
