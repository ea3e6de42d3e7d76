"""Parallel text: the same pairs from every kind of file, a stable split, and every bad file named with its place."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.config import PairsConfig
from jaxgpt.data.pairs import (
    Dropped,
    EncodedPairs,
    encode_pairs,
    joint_tokenizer,
    open_pairs,
    read_lines,
    read_pairs,
    where_they_part,
)
from jaxgpt.data.phrases import phrases
from jaxgpt.data.tokenizer import byte_tokenizer

# Python's splitlines ends a line at each of these; a file has them inside its sentences.
NO_LINE_ENDS = "\u2028\u2029\u0085\v\f\x1c\r"


PHRASES, HELD_OUT = phrases()


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_aligned(folder: Path, pairs, names=("a.en", "a.de"), end="\n") -> tuple[str, str]:
    sides = (end.join(pair[side] for pair in pairs) + end for side in (0, 1))
    source, target = (write(folder / name, text) for name, text in zip(names, sides, strict=True))
    return source, target


def random_pairs(seed: int, count: int) -> list[tuple[str, str]]:
    """Sentences with everything in them but newlines and tabs, some empty, some twice."""
    rng = random.Random(seed)
    sentences = ["".join(rng.choices("abc é漢😀\\\"'" + NO_LINE_ENDS, k=rng.randrange(12))) for _ in range(count)]
    # A carriage return before a newline belongs to the newline.
    return [(rng.choice(sentences).rstrip("\r"), rng.choice(sentences).rstrip("\r")) for _ in range(count)]


def read(*paths: str) -> list[tuple[str, str]]:
    return read_pairs(paths, "source", "target", "data.path")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, end, mark):
    for seed, count in enumerate((1, 2, 7, 100)):
        pairs = random_pairs(seed, count)
        source, target = (mark + end.join(pair[side] for pair in pairs) + end for side in (0, 1))
        table = mark + end.join("\t".join(pair) for pair in pairs) + end
        objects = [{"target": b, "id": 1, "source": a} for a, b in pairs]
        lines = mark + (end + end).join(json.dumps(o, ensure_ascii=bool(seed % 2)) for o in objects)
        assert read(write(tmp_path / "a.en", source), write(tmp_path / "a.de", target)) == pairs
        assert read(write(tmp_path / "a.tsv", table)) == pairs
        assert read(write(tmp_path / "a.jsonl", lines)) == pairs


def test_a_last_line_needs_no_newline_and_a_blank_one_counts(tmp_path):
    for text, lines in [("a\nb", ["a", "b"]), ("a\nb\n", ["a", "b"]), ("a\n\n", ["a", ""]), ("\n", [""]), ("", [])]:
        assert read_lines(Path(write(tmp_path / "a", text))) == lines
    assert read_lines(Path(write(tmp_path / "a", "\ufeff\ufeffa\r\r\n\ufeffb"))) == ["\ufeffa\r", "\ufeffb"]


def test_the_fields_of_json_lines_can_be_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"en": "one", "de": "eins", "source": "wrong", "target": "wrong"}')
    corpus = open_pairs(PairsConfig(path=(path,), validation=(path,), source_field="de", target_field="en"))
    assert corpus.train == corpus.held_out == [("eins", "one")]


def test_validation_is_what_is_held_out(tmp_path):
    train, held_out = random_pairs(0, 20), random_pairs(1, 5)
    files = write_aligned(tmp_path, train)
    corpora = [
        open_pairs(PairsConfig(path=files, validation=files)),
        open_pairs(PairsConfig(path=files, validation=write_aligned(tmp_path, held_out, ("b.en", "b.de")))),
    ]
    assert [(corpus.train, corpus.held_out) for corpus in corpora] == [(train, train), (train, held_out)]
    assert corpora[0].fingerprint != corpora[1].fingerprint


def test_a_share_is_held_out_and_equal_sources_stay_together(tmp_path):
    for seed, (count, share) in enumerate([(2, 0.01), (2, 0.75), (10, 0.99), (50, 0.1), (400, 0.05)]):
        sources = [f"sentence {n}" for n in range(count)]
        pairs = [(source, f"target {n}") for n, source in enumerate(sources + sources[: count // 2])]
        random.Random(seed).shuffle(pairs)
        corpus = open_pairs(PairsConfig(path=write_aligned(tmp_path, pairs), held_out=share))
        kept, held_out = ({source for source, _ in part} for part in (corpus.train, corpus.held_out))
        assert kept.isdisjoint(held_out) and kept | held_out == set(sources)
        assert len(held_out) == min(max(1, round(share * count)), count - 1), "some are kept, whatever the share"
        for part in (corpus.train, corpus.held_out):  # nothing is lost, nothing moves
            assert part == [pair for pair in pairs if pair in set(part)]


def test_what_is_held_out_does_not_depend_on_order_or_format(tmp_path):
    pairs = [(f"sentence {n}", f"target {n}") for n in range(200)]
    first = open_pairs(PairsConfig(path=write_aligned(tmp_path, pairs)))
    again = open_pairs(PairsConfig(path=write_aligned(tmp_path, pairs, ("c.en", "c.de"))))
    table = open_pairs(PairsConfig(path=(write(tmp_path / "a.tsv", "\n".join(map("\t".join, pairs))),)))
    assert first == again == table
    random.Random(0).shuffle(pairs)
    shuffled = open_pairs(PairsConfig(path=write_aligned(tmp_path, pairs)))
    assert set(shuffled.held_out) == set(first.held_out)
    assert shuffled.fingerprint != first.fingerprint  # batches follow the order


def test_the_fingerprint_is_of_the_pairs_and_their_split(tmp_path):
    pairs = [(f"sentence {n}", f"target {n}") for n in range(40)]
    changed = [*pairs[:-1], (pairs[-1][0], "another target")]
    files = write_aligned(tmp_path, pairs), write_aligned(tmp_path, changed, ("b.en", "b.de"))
    configs = [PairsConfig(path=path, held_out=share) for path in files for share in (0.1, 0.2)]
    assert len({open_pairs(config).fingerprint for config in configs}) == len(configs)


def test_without_a_path_there_are_phrases():
    corpus = open_pairs(PairsConfig())
    assert (corpus.train, corpus.held_out) == (PHRASES, HELD_OUT)


def test_what_is_missing_is_named(tmp_path):
    there = write(tmp_path / "a.en", "one\n")
    for paths in [(str(tmp_path / "a.de"),), (there, str(tmp_path / "a.de")), (str(tmp_path / "a.de"), there)]:
        with pytest.raises(FileNotFoundError, match=r"data\.path: there is no file .*a\.de"):
            open_pairs(PairsConfig(path=paths))
    with pytest.raises(FileNotFoundError, match=r"data\.validation: there is no file .*a\.de"):
        open_pairs(PairsConfig(path=(there, there), validation=(there, str(tmp_path / "a.de"))))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_pairs(PairsConfig(path=(str(tmp_path),)))  # a folder


def test_files_of_different_lengths_are_refused_with_the_place(tmp_path):
    pairs = PHRASES[:1_500]
    source, target = write_aligned(tmp_path, pairs)
    shorter, _ = write_aligned(tmp_path, pairs[:700] + pairs[701:], ("b.en", "b.de"))
    with pytest.raises(ValueError, match=r"not aligned; they seem to part at line (\d+)") as raised:
        open_pairs(PairsConfig(path=(shorter, target)))
    assert f"{shorter} has 1,499 lines and {target} 1,500" in str(raised.value)
    assert abs(int(str(raised.value).rsplit(" ", 1)[1]) - 701) <= 10
    with pytest.raises(ValueError, match=r"a\.en has 1,500 lines and .* 1,499: .* not aligned; they seem to part"):
        open_pairs(PairsConfig(path=(source, write_aligned(tmp_path, pairs[1:], ("c.en", "c.de"))[1])))
    empty = write(tmp_path / "empty", "")
    with pytest.raises(ValueError, match=r"has 0 lines and .* 1,500: they are not aligned$"):
        open_pairs(PairsConfig(path=(empty, target)))


def misaligned(pairs, rng: random.Random) -> tuple[list[str], list[str], int]:
    """The two sides, either with a line or a few more or less, and the number of the first line that does not fit."""
    left, right = (list(side) for side in zip(*pairs, strict=True))
    side, place, count = rng.choice((left, right)), rng.randrange(len(pairs)), rng.choice((1, 1, 1, 4))
    if rng.random() < 0.5:
        side[place:place] = rng.sample(rng.choice((left, right)), count)
    else:
        del side[place : place + count]
    return left, right, place + 1


def check_trials(pairs, count: int, size: int) -> None:
    rng, errors = random.Random(size), []
    for _ in range(count):
        start = rng.randrange(len(pairs) - size + 1)
        left, right, line = misaligned(pairs[start : start + size], rng)
        told = where_they_part(left, right)
        assert told is not None
        errors.append(abs(told - line))
    assert np.median(errors) <= 1 and np.quantile(errors, 0.9) <= 5 and max(errors) <= 15


@pytest.mark.parametrize("size", [30, 300, 2_000])
def test_a_line_too_many_or_too_few_is_found(size):
    check_trials(PHRASES, 60, size)


def test_a_line_too_many_or_too_few_is_found_in_captions(shared_data):
    sides = [
        (shared_data / "multi30k" / f"train.{language}").read_text("utf-8").split("\n") for language in ("en", "de")
    ]
    check_trials(list(zip(*sides, strict=True)), 60, 1_000)


def test_a_line_missing_at_either_end_is_found():
    left, right = (list(side) for side in zip(*PHRASES[:400], strict=True))
    for one, other in ((left, right), (right, left)):
        for count in range(1, 8):
            assert where_they_part(one[count:], other) in range(1, 5)
            assert where_they_part(one[:-count], other) in range(394 - count, 402 - count)


def test_no_line_is_told_where_lengths_say_nothing():
    assert where_they_part([], ["a"]) is None
    assert where_they_part(["same"] * 50, ["size"] * 51) is None
    rng = random.Random(0)
    unrelated = [["x" * rng.randrange(1, 80) for _ in range(size)] for size in (2_000, 2_001)]
    assert where_they_part(*unrelated) is None


def test_finding_the_line_is_quick():
    pairs = (PHRASES * 2)[:30_000]
    left, right, _ = misaligned(pairs, random.Random(0))
    start = time.process_time()
    where_they_part(left, right)
    assert time.process_time() - start < 3  # some hundredths; comparing all with all would take minutes


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.tsv", b"one", "line 3, has 0 tabs; it must have one, between source and target"),
        ("a.tsv", b"", "line 3, has 0 tabs; it must have one, between source and target"),
        ("a.tsv", b"one\teins\tuno", "line 3, has 2 tabs; it must have one"),
        ("a.tsv", b"one\t\xffeins", "line 3, is not UTF-8: byte 0xff at offset 4"),
        ("a.jsonl", b'{"source": "a", ', "line 3, is not JSON"),
        ("a.jsonl", b'["a", "b"]', "line 3, is not a JSON object"),
        ("a.jsonl", b'{"source": "a", "de": "b"}', "line 3, has no field 'target'; it has 'source', 'de'"),
        ("a.jsonl", b'{"en": "a", "target": "b"}', "line 3, has no field 'source'; it has 'en', 'target'"),
        ("a.jsonl", b'{"source": "a", "target": 3}', "line 3: the field 'target' is not text"),
        ("a.jsonl", b'{"source": "\xff", "target": "b"}', "line 3 is not UTF-8: byte 0xff at offset 12"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, line, message):
    good = {"a.tsv": b"a\tb\nc\td\n", "a.jsonl": b'{"source": "a", "target": "b"}\n\n'}[name]
    path = write(tmp_path / name, good + line + b"\n" + good)
    with pytest.raises(ValueError, match=message) as raised:
        open_pairs(PairsConfig(path=(path,)))
    assert str(raised.value).startswith(path)


def test_files_that_hold_no_pairs_are_refused(tmp_path):
    for name in ("a.tsv", "a.jsonl"):
        with pytest.raises(ValueError, match=rf"data\.path: .*{name} hold no pair"):
            open_pairs(PairsConfig(path=(write(tmp_path / name, "\ufeff"),)))
    empty = write(tmp_path / "a.en", ""), write(tmp_path / "a.de", "")
    with pytest.raises(ValueError, match=r"a\.en and .*a\.de hold no pair"):
        open_pairs(PairsConfig(path=empty))
    one = write(tmp_path / "b.tsv", "a\tb\n")
    with pytest.raises(ValueError, match=r"data\.validation: .* hold no pair"):
        open_pairs(PairsConfig(path=(one,), validation=empty))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    text, bad = write(tmp_path / "a.en", "one\n"), write(tmp_path / "bad", b"\xc3\xa9ab\xff")
    with pytest.raises(ValueError, match=r"a\.en alone is neither \.tsv nor \.jsonl; give the aligned file"):
        open_pairs(PairsConfig(path=(text,)))
    for paths in ((text, bad), (bad, text)):
        with pytest.raises(ValueError, match="bad, line 1, is not UTF-8: byte 0xff at offset 4"):
            open_pairs(PairsConfig(path=paths))
    with pytest.raises(ValueError, match="two aligned text files, source and target, or one file, not 3"):
        read(text, text, text)


def test_one_source_sentence_cannot_be_split(tmp_path):
    files = write_aligned(tmp_path, [("a", "b"), ("a", "c")])
    with pytest.raises(ValueError, match=r"one source sentence, so none can be held out; give data\.validation"):
        open_pairs(PairsConfig(path=files))
    assert len(open_pairs(PairsConfig(path=files, validation=files)).train) == 2


def encode(pairs, max_source=10, max_target=10) -> tuple[EncodedPairs, list[str]]:
    dropped = Dropped("training")
    encoded = encode_pairs(byte_tokenizer(), pairs, max_source, max_target, dropped)
    return encoded, list(dropped.report(len(encoded)))


def test_pairs_become_their_tokens_in_order():
    pairs = [(f"a{n}é", f"b{n}") for n in range(30)]
    encoded, report = encode(pairs)
    assert len(encoded) == 30 and encoded.text == pairs and report == []
    assert {ids.dtype for ids in (*encoded.source, *encoded.target)} == {np.dtype(np.int32)}
    for (source, target), ours, theirs in zip(pairs, encoded.source, encoded.target, strict=True):
        assert bytes(ours.tolist()).decode() == source and bytes(theirs.tolist()).decode() == target


def test_the_limits_are_exact():
    for max_source, max_target in [(1, 9), (9, 1), (5, 5)]:
        pairs = [("s" * a, "t" * b) for a in range(1, 11) for b in range(1, 11)]
        encoded, _ = encode(pairs, max_source, max_target)
        assert encoded.text == [pair for pair in pairs if len(pair[0]) <= max_source and len(pair[1]) <= max_target]
        assert [len(ids) for ids in encoded.source] == [len(source) for source, _ in encoded.text]
        assert [len(ids) for ids in encoded.target] == [len(target) for _, target in encoded.text]


def test_what_is_left_out_is_counted_by_reason_with_the_first_pair():
    rng = random.Random(0)
    kinds = {
        "their source is empty": lambda n: (" \u3000", f"t{n}"),
        "their target is empty": lambda n: (f"s{n}", "\t"),
        "their source has more than 10 tokens": lambda n: (f"source {n:04d}", "t"),
        "their target has more than 10 tokens": lambda n: (f"s{n}", f"target {n:04d}"),
        "": lambda n: (f"s{n}", f"t{n}"),
    }
    chosen = rng.choices(list(kinds), k=2_000)
    pairs = [kinds[kind](n) for n, kind in enumerate(chosen)]
    encoded, report = encode(pairs)
    assert encoded.text == [pair for pair, kind in zip(pairs, chosen, strict=True) if not kind]
    expected = {
        f"training: {chosen.count(kind):,} of 2,000 pairs left out, {kind} (the first: {place})"
        for kind in kinds
        if kind and (place := " -> ".join(map(repr, pairs[chosen.index(kind)])))
    }
    assert set(report) == expected and len(report) == 4


def test_a_long_pair_is_named_by_its_beginning():
    _, report = encode([("s" * 1_000, "t" * 1_000), ("s", "t")])
    assert "sssss" in report[0] and "ttttt" in report[0] and len(report[0]) < 250


def test_no_pair_left_says_why():
    message = (
        r"no pair is left: training: 2 of 3 .*source has more than 3 tokens .*; training: 1 of 3 .*target is empty"
    )
    with pytest.raises(ValueError, match=message):
        encode([("long source", "t"), ("s", " "), ("another long source", "t")], 3, 3)


def test_one_tokenizer_learns_both_sides():
    pairs = [(f"{word}ness", f"{word}heit") for word in ("dark", "clear", "sick", "wise", "free")] * 20
    tokenizer = joint_tokenizer(PairsConfig(vocab_size=330), pairs)
    assert 257 < tokenizer.vocab_size <= 330
    for ending in ("ness", "heit"):
        alone = joint_tokenizer(PairsConfig(vocab_size=330), [("a", "b")])
        assert len(tokenizer.encode(f"dark{ending}")) <= 2 < len(alone.encode(f"dark{ending}"))


def test_every_string_becomes_tokens_and_comes_back():
    tokenizer = joint_tokenizer(PairsConfig(vocab_size=400), PHRASES[:2_000])
    rng = random.Random(0)
    characters = [chr(n) for n in rng.sample(range(0x110000), 3_000) if not 0xD800 <= n < 0xE000] + list(NO_LINE_ENDS)
    for size in [0, 1, 2, *rng.choices(range(200), k=100)]:
        text = "".join(rng.choices(characters + list("the third of März  "), k=size))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(token < tokenizer.vocab_size and token != tokenizer.separator for token in ids)
    assert tokenizer.separator not in tokenizer.encode("<|endoftext|>")


def test_a_tokenizer_can_be_given(tmp_path):
    made = joint_tokenizer(PairsConfig(vocab_size=300), PHRASES[:500])
    made.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        given = joint_tokenizer(PairsConfig(tokenizer=str(path)), [("other", "text")])
        assert given.fingerprint == made.fingerprint
    with pytest.raises(FileNotFoundError, match=r"there is no tokenizer at .*nowhere"):
        joint_tokenizer(PairsConfig(tokenizer=str(tmp_path / "nowhere")), [("a", "b")])
