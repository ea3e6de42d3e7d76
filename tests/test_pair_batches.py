"""Batches of pairs: each pair once an epoch, few shapes, little padding, and a pure function of (seed, step)."""

import itertools

import numpy as np
import pytest

from jaxgpt.data.batches import Share
from jaxgpt.data.buckets import choose_bounds, rows_of
from jaxgpt.data.pair_batches import PairBatches, pair_lengths
from jaxgpt.data.pairs import EncodedPairs

END = 999  # no token of a sentence


def make_pairs(rng: np.random.Generator, count: int, longest: int) -> EncodedPairs:
    """Pairs of any lengths, an empty side now and then; each source's first token is its number."""
    sizes = rng.integers(0, longest + 1, (2, count))
    source, target = ([rng.integers(0, 50, size).astype(np.int32) for size in side] for side in sizes)
    for number in range(count):
        source[number] = np.concatenate([[1000 + number], source[number]]).astype(np.int32)
    return EncodedPairs(source, target, [("", "")] * count)


def random_cases(seed: int, count: int = 25):
    """(pairs, bounds, tokens, multiple): from one pair to some hundreds, batches larger than all of it among them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        pairs = make_pairs(rng, int(rng.integers(1, 300)), int(rng.integers(0, 40)))
        bounds = rng.choice(np.arange(1, 43), rng.integers(1, 6), replace=False).tolist()
        yield pairs, bounds, int(rng.integers(1, 600)), int(rng.integers(1, 9))


def batches_of(case, seed: int = 0) -> PairBatches:
    pairs, bounds, tokens, multiple = case
    return PairBatches(pairs, END, bounds, tokens, multiple, seed)


def epoch(batches: PairBatches, number: int = 0) -> list[dict[str, np.ndarray]]:
    start = number * batches.order.batches_per_epoch
    return [batches.batch(step) for step in range(start, start + batches.order.batches_per_epoch)]


def rows(batches) -> list[tuple[list[int], list[int]]]:
    """(source, target) of each row that has weight, as the weights and lengths say."""
    return [
        (
            batch["source"][row, : batch["source_length"][row]].tolist(),
            batch["targets"][row][batch["weights"][row] == 1].tolist(),
        )
        for batch in batches
        for row in np.flatnonzero(batch["weights"].any(axis=1))
    ]


def with_ends(pairs: EncodedPairs) -> list[tuple[list[int], list[int]]]:
    return [([*s.tolist(), END], [*t.tolist(), END]) for s, t in zip(pairs.source, pairs.target, strict=True)]


def test_every_pair_comes_once_an_epoch_and_once_in_order():
    for case in random_cases(0):
        batches, expected = batches_of(case), sorted(with_ends(case[0]))
        for number in range(2):
            assert sorted(rows(epoch(batches, number))) == expected
        in_order = list(batches.in_order())
        assert sorted(rows(in_order)) == expected and len(in_order) == batches.order.batches_per_epoch


def test_in_order_is_by_length_and_then_as_given():
    for case in random_cases(1):
        seen = [source[0] - 1000 for source, _ in rows(batches_of(case).in_order())]
        bounds = [bucket.length for bucket in batches_of(case).order.buckets]
        places = np.searchsorted(bounds, pair_lengths(case[0]))
        assert seen == sorted(range(len(seen)), key=lambda number: (places[number], number))


def test_fields_of_a_batch():
    for case in random_cases(2):
        for batch in epoch(batches_of(case)):
            shape = batch["source"].shape
            assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
                "source": (shape, "int32"),
                "source_length": (shape[:1], "int32"),
                "target": (shape, "int32"),
                "targets": (shape, "int32"),
                "weights": (shape, "float32"),
                "row": (shape[:1], "int32"),
            }
            assert np.array_equal(batch["row"], np.arange(shape[0]))
            # What the decoder reads is what it should say, one place later, behind the token that begins all.
            assert (batch["target"][:, 0] == END).all()
            assert np.array_equal(batch["target"][:, 1:], batch["targets"][:, :-1])


def test_padding_has_no_weight_and_the_end_token_has():
    for case in random_cases(3):
        for batch in epoch(batches_of(case)):
            weights, lengths = batch["weights"], batch["source_length"]
            assert set(np.unique(weights)) <= {0.0, 1.0}
            assert (np.diff(weights, axis=1) <= 0).all()  # first what counts, then padding
            assert (batch["targets"][weights == 0] == END).all()
            last = np.maximum(weights.sum(axis=1).astype(int) - 1, 0)
            assert (np.take_along_axis(batch["targets"], last[:, None], 1) == END).all()
            assert ((lengths >= 1) & (lengths <= batch["source"].shape[1])).all()
            assert (batch["source"][np.arange(batch["source"].shape[1]) >= lengths[:, None] - 1] == END).all()
            assert weights.any()  # no batch of nothing


def test_shapes_are_those_of_the_buckets():
    for case in random_cases(4):
        pairs, bounds, tokens, multiple = case
        batches, longest = batches_of(case), int(pair_lengths(pairs).max())
        shapes = {(bucket.rows, bucket.length) for bucket in batches.order.buckets}
        assert {batch["source"].shape for batch in epoch(batches)} == shapes
        assert {batch["source"].shape for batch in batches.in_order()} == shapes
        assert {length for _, length in shapes} <= {*bounds, longest}
        for count, length in shapes:
            assert count % multiple == 0
            assert count * length <= tokens or count == multiple
            assert (count + multiple) * length > tokens  # and as many as that allows


def test_a_pair_is_in_the_smallest_bucket_that_holds_it():
    for case in random_cases(5):
        pairs, bounds, _, _ = case
        lengths = pair_lengths(pairs)
        available = sorted({*bounds, max(int(lengths.max()), max(bounds))})  # one more for what is longer than all
        members = [bucket.members for bucket in batches_of(case).order.buckets]
        assert sorted(np.concatenate(members)) == list(range(len(pairs)))
        for bucket in batches_of(case).order.buckets:
            for member in bucket.members:
                size = max(len(pairs.source[member]), len(pairs.target[member])) + 1
                assert bucket.length == next(bound for bound in available if bound >= size)


def test_pairs_longer_than_all_bounds_get_a_bucket():
    pairs = make_pairs(np.random.default_rng(0), 200, 30)
    batches = PairBatches(pairs, END, [5, 9], 100, 4, 0)
    assert [bucket.length for bucket in batches.order.buckets] == [5, 9, int(pair_lengths(pairs).max())]
    assert len(rows(epoch(batches))) == 200


def equal(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_batch_depends_on_seed_and_step_alone():
    case = next(random_cases(6, 1))
    batches = batches_of(case, seed=3)
    in_order = [batches.batch(step) for step in range(4 * batches.order.batches_per_epoch)]
    for step in np.random.default_rng(7).permutation(len(in_order)):
        assert equal(batches_of(case, seed=3).batch(int(step)), in_order[step])
        assert equal(batches.batch(int(step)), in_order[step])


def test_seeds_and_epochs_differ_in_order_and_in_company():
    pairs = make_pairs(np.random.default_rng(8), 400, 20)
    orders, companies = set(), set()
    for seed, number in itertools.product(range(3), range(3)):
        made = epoch(PairBatches(pairs, END, [8, 22], 100, 2, seed), number)
        orders.add(tuple(batch["source"].shape for batch in made))
        companies.add(frozenset(frozenset(batch["source"][:, 0].tolist()) for batch in made))
    assert len(orders) == len(companies) == 9


def test_long_and_short_batches_are_mixed():
    """Sorted by length, an epoch would begin with nothing but short sentences."""
    pairs = make_pairs(np.random.default_rng(9), 2_000, 20)
    lengths = [batch["source"].shape[1] for batch in epoch(PairBatches(pairs, END, [4, 8, 12, 16, 22], 100, 1, 0))]
    half = len(lengths) // 2
    assert abs(np.mean(lengths[:half]) / np.mean(lengths[half:]) - 1) < 0.1


def test_the_padding_share_is_what_the_batches_show():
    for case in random_cases(10):
        batches = batches_of(case)
        weights = np.concatenate([batch["weights"].ravel() for batch in epoch(batches)]).astype(float)
        assert batches.padding_share == pytest.approx(1 - weights.mean(), abs=1e-9)


def places(lengths, bounds, tokens, multiple) -> int:
    """Places of an epoch, counted bucket by bucket."""
    total, below = 0, 0
    for bound in sorted(bounds):
        count = int(((lengths > below) & (lengths <= bound)).sum())
        size = max(1, tokens // (bound * multiple)) * multiple
        total, below = total + -(-count // size) * size * bound, bound
    return total


def test_the_bounds_are_the_best_of_all():
    rng = np.random.default_rng(11)
    for _ in range(60):
        kinds = rng.choice(np.arange(1, 60), rng.integers(1, 8), replace=False)
        lengths = rng.choice(kinds, rng.integers(1, 400))
        tokens, multiple, most = int(rng.integers(1, 400)), int(rng.integers(1, 5)), int(rng.integers(1, 6))
        bounds = choose_bounds(lengths, tokens, multiple, most)
        assert bounds == sorted(set(bounds)) and set(bounds) <= set(lengths.tolist())
        assert 1 <= len(bounds) <= most and bounds[-1] == lengths.max()
        sizes = sorted(set(lengths.tolist()))
        every = ((*some, sizes[-1]) for count in range(most) for some in itertools.combinations(sizes[:-1], count))
        best = min(places(lengths, choice, tokens, multiple) for choice in every)
        assert places(lengths, bounds, tokens, multiple) == best


def test_more_buckets_leave_less_padding():
    rng = np.random.default_rng(12)
    pairs = make_pairs(rng, 3_000, 40)
    shares = []
    for most in (1, 2, 4, 8, 50):
        bounds = choose_bounds(pair_lengths(pairs), 1_000, 8, most)
        shares.append(PairBatches(pairs, END, bounds, 1_000, 8, 0).padding_share)
    assert shares == sorted(shares, reverse=True) and len(set(shares)) > 3
    assert shares[-1] < shares[0] - 0.15  # what is left stands beside longer sources


def test_rows_of_a_batch():
    for length, tokens, multiple in itertools.product(range(1, 12), range(1, 60), range(1, 5)):
        count = rows_of(length, tokens, multiple)
        fitting = [n for n in range(multiple, 100, multiple) if n * length <= tokens]
        assert count == max(fitting, default=multiple)


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_shares_of_hosts_are_the_batch(hosts):
    batches = PairBatches(make_pairs(np.random.default_rng(hosts), 90, 20), END, [5, 12, 22], 200, 8, 0)
    shares = [Share(host, host + 1, hosts) for host in range(hosts)]
    steps = range(batches.order.batches_per_epoch)
    trained = [(batches.batch(step), *(batches.batch(step, share) for share in shares)) for step in steps]
    held_out = zip(batches.in_order(), *(batches.in_order(share) for share in shares), strict=True)
    for whole, *own in (*trained, *held_out):
        for name, x in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in own]), x, err_msg=name)
