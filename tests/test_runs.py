"""The run folder: it takes no other's place, forgets nothing, and is never half written."""

import os

import matplotlib.image
import numpy as np
import pytest

from jaxgpt.storage.runs import RunFolder, latest_run_path, new_run_path, write_atomically


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def test_a_new_folder_is_made_and_a_taken_one_refused(run):
    run.create()
    run.create()  # still empty
    assert not run.exists()
    run.describe_as({"config": {"a": 1}})
    assert run.exists()
    with pytest.raises(FileExistsError, match=f"{run.path} holds another run; .*--resume"):
        run.create()


def test_what_is_no_run_is_refused(run):
    run.path.mkdir()
    (run.path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a run"):
        run.create()
    with pytest.raises(FileExistsError, match="is not a run"):
        RunFolder(run.path / "thesis.txt").check_free()
    assert [path.name for path in run.path.iterdir()] == ["thesis.txt"]


def test_the_description_comes_back(run):
    run.create()
    run.describe_as({"recipe": "default", "config": {"steps": 3}})
    assert run.describe() == {"format": 1, "recipe": "default", "config": {"steps": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "is not of format 1"), ('{"format": 2}', "is not of format 1")],
)
def test_a_description_that_cannot_be_read_is_named(run, text, message):
    run.create()
    run.config.write_text(text)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        run.describe()


def test_a_folder_without_a_run_is_said(run):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        run.describe()


def test_history_is_what_was_logged(run):
    run.create()
    assert run.history() == []
    records = [{"step": step, "train/loss": 1 / step} for step in range(1, 6)]
    for record in records:
        run.log(record)
    assert run.history() == records


@pytest.mark.parametrize("unfinished", ['{"step": 6, "train/', "{", '{"step": 6}'[:-1]])
def test_a_line_that_a_killed_run_left_unfinished_is_left_out(run, unfinished):
    run.create()
    for step in range(1, 6):
        run.log({"step": step})
    with run.metrics.open("a") as file:
        file.write(unfinished)
    assert [record["step"] for record in run.history()] == [1, 2, 3, 4, 5]
    run.rewind(5)
    run.log({"step": 6})
    assert [record["step"] for record in run.history()] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_line_in_the_middle_is_named(run):
    run.create()
    run.metrics.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not valid JSON"):
        run.history()


def test_rewinding_forgets_what_came_after(run):
    run.create()
    for step in range(1, 6):
        run.log({"step": step})
    run.rewind(3)
    assert [record["step"] for record in run.history()] == [1, 2, 3]
    run.rewind(-1)
    assert run.history() == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new" * 10_000 + "\ud800")
    assert path.read_text() == "old"
    write_atomically(path, "ü")
    assert path.read_text("utf-8") == "ü"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_samples_are_appended(run):
    run.create()
    run.add_sample(10, "first")
    run.add_sample(20, "zweite ü")
    assert run.samples.read_text("utf-8") == "--- step 10 ---\nfirst\n\n--- step 20 ---\nzweite ü\n\n"


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0, "eval/loss": 5.5}],
        [{"step": 1, "train/loss": 3.0}],
        [{"step": 1, "train/loss": float("nan")}, {"step": 2, "train/loss": float("inf"), "eval/loss": float("nan")}],
        [{"step": s, "train/loss": 5 / s} for s in range(1, 30)] + [{"step": s, "eval/loss": 3.0} for s in (0, 30)],
    ],
    ids=["nothing", "one evaluation", "one step", "not finite", "a run"],
)
def test_curves_are_drawn_whatever_there_is(run, records):
    run.create()
    for record in records:
        run.log(record)
    run.draw_curves()
    image = matplotlib.image.imread(run.curves)
    assert image.shape[:2] == (675, 1200) and image.std() > 0
    assert {path.name for path in run.path.iterdir()} <= {"curves.png", "metrics.jsonl"}
    losses = [value for record in records for name, value in record.items() if name != "step" and np.isfinite(value)]
    colourful = (np.ptp(image[..., :3], axis=-1) > 0.2).sum()
    assert colourful > 0 or not len(losses) > 1


def test_what_is_not_finite_is_left_out_of_the_curves(run):
    run.create()
    images = []
    for gap in ([], [{"step": 2, "train/loss": float("nan")}, {"step": 2, "eval/loss": float("inf")}]):
        run.rewind(-1)
        for record in [{"step": 1, "train/loss": 3.0, "eval/loss": 3.0}, *gap, {"step": 3, "train/loss": 2.0}]:
            run.log(record)
        run.draw_curves()
        images.append(matplotlib.image.imread(run.curves))
    np.testing.assert_array_equal(*images)


def test_runs_are_numbered_and_the_newest_found(tmp_path):
    assert latest_run_path(tmp_path, "gpt2") is None
    paths = []
    for number in range(3):
        path = new_run_path(tmp_path, "gpt2")
        RunFolder(path).create()
        RunFolder(path).describe_as({})
        paths.append(path)
        age = 1_000_000_000 + 100 * number
        os.utime(RunFolder(path).config, (age, age))
    assert [path.name for path in paths] == ["gpt2", "gpt2-2", "gpt2-3"]
    other = RunFolder(new_run_path(tmp_path, "gpt2-medium"))
    other.create()
    other.describe_as({})
    new_run_path(tmp_path, "gpt2").mkdir()  # a folder in which no run began
    assert latest_run_path(tmp_path, "gpt2") == paths[-1]
    assert latest_run_path(tmp_path, "gpt2-medium") == other.path


def test_every_file_of_a_run_lies_in_its_folder(run):
    paths = [run.config, run.metrics, run.curves, run.samples, run.tokenizer, run.checkpoints]
    assert {path.parent for path in paths} == {run.path} and len(set(paths)) == 6
