"""The split is the rule it was before, found without the documents."""

import hashlib
import random

import numpy as np

from jaxgpt.data.split import decide_split, record_documents


def by_the_rule(texts, share):
    """The documents held out, one after another in the order of their digests, as the docstring says it."""
    sizes = {}
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        sizes[digest] = sizes.get(digest, 0) + len(text.encode())
    total, held, size = sum(sizes.values()), set(), 0
    for digest in sorted(sizes):
        if size < share * total and sizes[digest] <= max(share, 0.5) * total and len(held) < len(sizes) - 1:
            held.add(digest)
            size += sizes[digest]
    return held


def test_what_is_held_out_is_what_the_rule_says():
    rng = random.Random(0)
    for number in range(300):
        texts = [f"{number} {n} " + "é" * rng.choice([1, 5, 50, 2000]) for n in range(rng.randrange(2, 12))]
        texts += rng.choices(texts, k=rng.randrange(4))  # copies
        share = rng.choice([0.001, 0.1, 0.3, 0.5, 0.7, 0.999])
        records = record_documents(texts)
        split, held = decide_split(records, share), by_the_rule(texts, share)
        expected = [hashlib.sha256(text.encode()).digest() in held for text in texts]
        assert split.held_out(records).tolist() == expected
        assert list(split.part(texts, held_out=True)) == [t for t, out in zip(texts, expected, strict=True) if out]
        assert list(split.part(texts, held_out=False)) == [t for t, out in zip(texts, expected, strict=True) if not out]


def test_digests_that_end_in_zeros_are_whole():
    digests = [bytes([9] * 31 + [0]), bytes([5] * 30 + [0, 0]), bytes([7] * 32), bytes(32)]
    records = np.array([(digest, 10, 10) for digest in digests], record_documents([]).dtype)
    split = decide_split(records, 0.5)
    assert split.last_held_out == digests[1]
    assert split.held_out(records).tolist() == [False, True, False, True]
    assert split.fingerprint == hashlib.sha256(b"".join(digests)).hexdigest()
