"""Damaged and hostile files: every reader gives what was written, or one clear sentence. `fuzz.py` takes longer."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutate, with_checksum
from readers import READERS, Target

ROOT = Path(__file__).parents[1]
SLOW = {"checkpoint", "run", "model", "unfinished"}
# What runs code that it reads; none of these patterns matches itself.
FORBIDDEN = [
    r"(?<![\w.])(eval|exec)\(",
    r"(?<![\w.])(torch|yaml)\.load\(",
    r"(?<![\w.])(pickle|marshal|joblib)\.load",
    r"^\s*(import|from) (pickle|dill|cloudpickle|marshal|joblib|shelve)\b",
    r"allow_pickle=(True|1)",
]


@pytest.fixture(scope="module")
def targets():
    made = {}
    return lambda name: made.setdefault(name, Target(name))


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", READERS)
def test_what_is_read_is_what_was_written_or_one_clear_sentence(targets, name):
    target = targets(name)

    @settings(
        max_examples=10 if name in SLOW else 30,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def attempt(seed):
        finding, _ = target.attempt_numbered(seed)
        assert finding is None

    attempt()


@settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
@pytest.mark.parametrize("name", ["tokenizer", "safetensors", "pairs", "conversations", "tokens"])
def test_random_bytes(targets, name, content):
    finding, _ = targets(name).attempt_with(content)
    assert finding is None


def test_the_attempts_find_what_is_not_refused_as_it_should_be(targets):
    for error in (KeyError("x"), RecursionError(), MemoryError(), BaseException("panic"), ValueError(""), OSError("x")):
        assert targets("pairs").judge(None, error, "a.tsv")[0], error
    assert targets("tokens").judge(b"other", None, "train-00000.npy")[0]
    assert not targets("pairs").judge(None, ValueError("line 3 has no tab\nand more"), "a.tsv")[0]


@settings(derandomize=True, deadline=None, database=None)
@given(st.randoms(use_true_random=False))
def test_mutations_change_files_of_all_kinds(rng):
    for name, content in (
        ("a.json", b'{"a": [1, {"b": null}]}'),
        ("b.jsonl", b'{"a": 1}\n{"b": 2}'),
        ("c.bin", b"\0\1"),
    ):
        assert isinstance(mutate(content, rng, name), bytes)
        assert isinstance(with_checksum(mutate(content, rng, name)), bytes)


def test_nothing_here_unpickles_or_evaluates_what_it_reads():
    files = [path for part in ("jaxgpt", "benchmarks", "tests") for path in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    for path in [*files, ROOT / "train.py"]:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            for pattern in FORBIDDEN:
                assert not re.search(pattern, line), f"{path}, line {number}: {line}"
