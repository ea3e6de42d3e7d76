"""Batches: a pure function of (seed, step) in which each window comes once an epoch, and each held-out target once."""

import contextlib
import itertools
import threading

import numpy as np
import pytest

from jaxgpt.data.batches import Share, WindowBatches, evaluation_batches, prefetch
from jaxgpt.data.shards import TokenStream


def counting_stream(size: int, shards: int = 3) -> TokenStream:
    """Tokens 0, 1, 2, ...: each says where it stands."""
    return TokenStream(tuple(np.array_split(np.arange(size, dtype=np.uint32), shards)), documents=1, bytes=size)


def random_cases(seed: int, count: int = 25) -> list[tuple[int, int, int]]:
    """(tokens, T, B) with anything from one window to many, and batches larger than an epoch."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, count)
    sizes = lengths + 1 + rng.integers(0, 200, count)
    return [(int(n), int(t), int(b)) for n, t, b in zip(sizes, lengths, rng.integers(1, 9, count), strict=True)]


def epochs(batches: WindowBatches, count: int) -> np.ndarray:
    """The first token of each window of the first epochs, (count, windows)."""
    steps = -(-count * batches.windows // batches.batch_size)
    first = np.concatenate([batches.batch(step)["tokens"][:, 0] for step in range(steps)])
    return first[: count * batches.windows].reshape(count, -1)


def test_fields_of_a_batch():
    for size, length, rows in random_cases(0):
        batch = WindowBatches(counting_stream(size), length, rows, 1).batch(5)
        assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
            "tokens": ((rows, length), "int32"),
            "targets": ((rows, length), "int32"),
            "weights": ((rows, length), "float32"),
            "row": ((rows,), "int32"),
        }
        assert np.array_equal(batch["tokens"], batch["tokens"][:, :1] + np.arange(length))
        assert np.array_equal(batch["targets"], batch["tokens"] + 1)
        assert batch["targets"].max() < size
        assert (batch["weights"] == 1).all()
        assert np.array_equal(batch["row"], np.arange(rows))


def test_each_window_comes_once_an_epoch():
    for size, length, rows in random_cases(1):
        batches = WindowBatches(counting_stream(size), length, rows, 2)
        assert batches.windows == (size - 1) // length
        for starts in epochs(batches, 3):
            # Side by side from some phase on: none twice, no token between two of them left out.
            assert np.array_equal(np.sort(starts), starts.min() + length * np.arange(batches.windows))
            assert 0 <= starts.min() <= (size - 1) % length


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_each_position_once_an_epoch_in_the_same_global_order(hosts):
    for size, length, rows in random_cases(7):
        rows *= 4
        batches = WindowBatches(counting_stream(size), length, rows, 2)
        steps = -(-batches.windows // rows)
        shares = [Share(host, host + 1, hosts) for host in range(hosts)]
        parts = [[batches.batch(step, share) for step in range(steps)] for share in shares]
        whole = [batches.batch(step) for step in range(steps)]
        for step, batch in enumerate(whole):
            own = [part[step] for part in parts]
            assert {len(part["row"]) for part in own} == {rows // hosts}
            for name, x in batch.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in own]), x)
        # The epoch's end may lie within a batch: positions from there on are of the next one.
        places = [step * rows + part["row"] for own in parts for step, part in enumerate(own)]
        seen = np.concatenate([part["tokens"][:, 0] for own in parts for part in own])
        seen = seen[np.concatenate(places) < batches.windows]
        assert np.array_equal(np.sort(seen), seen.min() + length * np.arange(batches.windows))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_each_held_out_target_once(hosts):
    for size, length, rows in random_cases(8):
        whole = list(evaluation_batches(counting_stream(size), length, 4 * rows))
        parts = [
            list(evaluation_batches(counting_stream(size), length, 4 * rows, Share(host, host + 1, hosts)))
            for host in range(hosts)
        ]
        for batch, *own in zip(whole, *parts, strict=True):
            for name, x in batch.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in own]), x)


def test_a_batch_depends_on_seed_and_step_alone():
    stream = counting_stream(500)
    batches = WindowBatches(stream, 8, 4, 3)
    in_order = [batches.batch(step)["tokens"] for step in range(40)]
    for step in np.random.default_rng(4).permutation(40):
        fresh = WindowBatches(counting_stream(500, shards=7), 8, 4, 3)
        assert np.array_equal(fresh.batch(int(step))["tokens"], in_order[step])


def test_the_order_does_not_depend_on_the_batch_size():
    small, large = (WindowBatches(counting_stream(300), 5, rows, 5) for rows in (2, 6))
    for step in range(20):
        joined = np.concatenate([small.batch(3 * step + i)["tokens"] for i in range(3)])
        assert np.array_equal(joined, large.batch(step)["tokens"])


def test_seeds_and_epochs_differ_in_order_and_phase():
    orders = [epochs(WindowBatches(counting_stream(1000), 31, 4, seed), 8) for seed in (0, 1)]
    every = [tuple(starts) for order in orders for starts in order]
    assert len(set(every)) == len(every)
    assert len({min(starts) for starts in every}) > 1
    assert all(starts != tuple(sorted(starts)) for starts in every)


def test_evaluation_covers_each_target_once():
    for size, length, rows in random_cases(6):
        stream = counting_stream(size)
        batches = list(evaluation_batches(stream, length, rows))
        assert {batch[name].shape for batch in batches for name in ("tokens", "targets", "weights")} == {(rows, length)}
        assert {tuple(batch["row"]) for batch in batches} == {tuple(range(rows))}
        counts = np.concatenate([batch["weights"].ravel() for batch in batches]) == 1
        targets = np.concatenate([batch["targets"].ravel() for batch in batches])
        tokens = np.concatenate([batch["tokens"].ravel() for batch in batches])
        assert np.array_equal(targets[counts], np.arange(1, size))
        assert np.array_equal(tokens[counts], np.arange(size - 1))
        assert sum(batch["weights"].sum() for batch in batches) == size - 1
        assert all(batch["weights"].any() for batch in batches)


def test_token_zero_is_no_padding():
    stream = TokenStream((np.zeros(50, np.uint16),), documents=1, bytes=50)
    assert sum(batch["weights"].sum() for batch in evaluation_batches(stream, 8, 4)) == 49
    assert WindowBatches(stream, 8, 4, 0).batch(0)["weights"].all()


def test_a_split_shorter_than_one_context_is_refused():
    assert WindowBatches(counting_stream(9), 8, 2, 0).windows == 1
    assert len(list(evaluation_batches(counting_stream(9), 8, 2))) == 1
    with pytest.raises(ValueError, match="training split has 8 tokens, fewer than the 9"):
        WindowBatches(counting_stream(8), 8, 2, 0)
    with pytest.raises(ValueError, match="held-out split has 8 tokens, fewer than the 9"):
        next(evaluation_batches(counting_stream(8), 8, 2))


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetching_changes_nothing():
    batches = WindowBatches(counting_stream(100), 4, 3, 0)
    for start, stop, depth in [(0, 0, 2), (3, 4, 1), (5, 30, 1), (0, 30, 4)]:
        ahead = list(prefetch(batches.batch, start, stop, depth))
        assert len(ahead) == stop - start
        for step, batch in enumerate(ahead, start):
            assert np.array_equal(batch["tokens"], batches.batch(step)["tokens"])


def test_prefetching_runs_ahead_but_not_far():
    made, enough = [], threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if len(made) == 4:  # one taken, two waiting, one at the door
            enough.set()
        return step

    steps = prefetch(make, 0, 1000, 2)
    assert next(steps) == 0
    assert enough.wait(10)
    assert len(made) <= 4
    steps.close()


def test_an_error_ahead_is_raised_at_its_place():
    def make(step: int) -> int:
        if step == 3:
            raise ZeroDivisionError("step 3")
        return step

    steps = prefetch(make, 0, 10)
    assert list(itertools.islice(steps, 3)) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="step 3"):
        next(steps)


@pytest.mark.parametrize("end", ["closed early", "run to its end", "error"])
def test_the_thread_ends_with_the_iterator(end):
    before, finish = set(prefetch_threads()), threading.Event()

    def make(step: int) -> int:
        if step == 5:
            finish.wait(10)  # so that the thread is still there to be found
            if end == "error":
                raise ZeroDivisionError
        return step

    steps = prefetch(make, 0, 6 if end == "run to its end" else 10**9)
    next(steps)
    (thread,) = set(prefetch_threads()) - before
    finish.set()
    if end == "closed early":
        steps.close()
    else:
        with contextlib.suppress(ZeroDivisionError):
            assert list(steps) == [1, 2, 3, 4, 5]
    thread.join(timeout=10)
    assert not thread.is_alive()
