"""What is said of a checkpoint's wholeness is right, whichever bit of it is another."""

import json

import numpy as np
import pytest

from jaxgpt.storage.integrity import (
    FORMAT,
    DamagedCheckpointError,
    UnknownFormatError,
    check_seal,
    root_cause,
    sealed,
    unreadable_metrics,
)

CONTENT = {"checksums": {"a/b": 123456789}, "extra": {"best": float("inf"), "seconds": 0.1 + 0.2}, "metrics": {}}


def test_what_was_sealed_comes_back_through_json():
    assert check_seal(json.loads(json.dumps(sealed(CONTENT)))) == {"format": FORMAT} | CONTENT


def test_no_flipped_bit_changes_the_content():
    text = json.dumps(sealed(CONTENT)).encode()
    for place in np.random.default_rng(0).permutation(8 * len(text))[:600].tolist():
        changed = bytearray(text)
        changed[place // 8] ^= 1 << place % 8
        try:
            values = json.loads(changed.decode())
        except ValueError:
            continue
        try:
            content = check_seal(values)
        except DamagedCheckpointError:
            continue
        assert {name: content.get(name) for name in CONTENT} == CONTENT  # a letter in the name of the seal


def test_another_format_is_no_damage():
    newer = sealed(CONTENT) | {"format": FORMAT + 1}
    del newer["seal"]
    with pytest.raises(UnknownFormatError, match=f"of format {FORMAT + 1}, and this version .* reads format {FORMAT}"):
        check_seal(newer)
    with pytest.raises(DamagedCheckpointError):  # but a digit that is another is
        check_seal(sealed(CONTENT) | {"format": FORMAT + 1})


@pytest.mark.parametrize("metadata", [None, {}, [], "text", {"seal": 1}])
def test_metadata_that_is_none_is_damage(metadata):
    with pytest.raises(DamagedCheckpointError, match="_CHECKPOINT_METADATA"):
        check_seal(metadata)


def test_metrics_that_cannot_be_read_are_named(tmp_path):
    texts = {1: '{"eval/loss": 2.5}', 2: "", 3: '{"eval/lozs": 2.5}', 4: '{"eval/loss": "2.5"}', 5: "[1]"}
    texts |= {6: '{"eval/loss": NaN}', 7: "\x00"}
    for step, text in texts.items():
        (tmp_path / str(step) / "metrics").mkdir(parents=True)
        (tmp_path / str(step) / "metrics" / "metrics").write_text(text)
    (tmp_path / "8").mkdir()  # was not measured
    (tmp_path / "2").rename(tmp_path / "2.damaged")
    assert set(unreadable_metrics(tmp_path, "eval/loss")) == {3, 4, 5, 6, 7}


def test_the_cause_is_the_innermost_that_was_not_hidden():
    def fail():
        try:
            try:
                raise StopIteration(0)
            except StopIteration:
                raise ValueError("no JSON\nmore") from None
        except ValueError as error:
            raise KeyError("wrapped") from error

    with pytest.raises(KeyError) as caught:
        fail()
    assert root_cause(caught.value) == "no JSON"
    assert root_cause(OSError()) == "OSError" and root_cause(ValueError("a [tensorstore_spec='{}'] b")) == "a"
