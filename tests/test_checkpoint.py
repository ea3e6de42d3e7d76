"""Checkpoints: what comes back is what was saved, or an error that says so; the newest and the best are kept."""

import contextlib
import functools
import gc
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxgpt.hosts import Hosts
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.storage.integrity import DamagedCheckpointError, UnknownFormatError

ROOT = Path(__file__).parents[1]


def orbax_leaves_coroutines(test):
    """Orbax leaves coroutines un-awaited where a file cannot be read; Python says so when they are collected."""

    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @functools.wraps(test)
    def collecting(**fixtures):
        try:
            test(**fixtures)
        finally:
            gc.collect()

    return collecting


def make_trees(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "parameters": {
            "blocks": {"kernel": jax.random.normal(keys[0], (2, 3, 4))},
            "half": jax.random.normal(keys[1], (5, 7)).astype(jnp.bfloat16),
        },
        "optimizer": (jnp.int32(seed), {"moment": jax.random.normal(keys[2], (40,)), "mask": jnp.arange(3) > seed}),
    }


def shapes_of(trees):
    return jax.eval_shape(lambda: trees)


def device():
    return SingleDeviceSharding(jax.devices()[0])


def assert_bit_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.array(a).tobytes() == np.array(b).tobytes()


def save(folder, losses, start=1):
    """Save a checkpoint for each loss (None: not measured) at steps start, start + 1, ..."""
    checkpoints = Checkpoints(folder)
    for step, loss in enumerate(losses, start):
        metrics = None if loss is None else {"eval/loss": loss}
        checkpoints.save(step, make_trees(step), metrics=metrics, extra={"seconds": 1.5, "step": step})
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, [2.0])
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def restore(folder, step=1, shapes=None, sharding=None):
    shapes = shapes_of(make_trees(step)) if shapes is None else shapes
    return Checkpoints(folder, read_only=True).restore(step, shapes, sharding or device())


def test_what_was_saved_comes_back_bit_by_bit(saved):
    trees, extra = restore(saved)
    assert_bit_equal(trees, make_trees(1))
    assert extra == {"seconds": 1.5, "step": 1}


def test_parameters_come_back_alone(saved):
    wanted = {"parameters": make_trees(1)["parameters"]}
    trees, _ = restore(saved, shapes=shapes_of(wanted))
    assert_bit_equal(trees, wanted)


def test_any_number_of_devices_reads_it(saved):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    trees, _ = restore(saved, sharding=NamedSharding(mesh, PartitionSpec()))
    assert_bit_equal(trees, make_trees(1))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(trees)} == {4}


def test_what_several_devices_hold_is_saved_once(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    trees = jax.device_put(make_trees(1), NamedSharding(mesh, PartitionSpec()))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, trees, metrics=None, extra={})
    checkpoints.close()
    assert_bit_equal(restore(tmp_path / "c")[0], make_trees(1))


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    trees = make_trees(1)
    checkpoints.save(1, trees, metrics=None, extra={})
    jax.tree.map(lambda leaf: leaf.delete(), trees)
    checkpoints.close()
    assert_bit_equal(restore(tmp_path / "c")[0], make_trees(1))


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ([3.0, 1.0, 2.0, 2.5], [2, 4], 2),
        ([3.0, 2.0, 1.0], [3], 3),
        ([1.0, None, None], [1, 3], 1),
        ([None, None], [2], 2),
    ],
)
def test_the_newest_and_the_best_are_kept_and_nothing_else(tmp_path, losses, kept, best):
    save(tmp_path / "c", losses)
    for checkpoints in (Checkpoints(tmp_path / "c"), Checkpoints(tmp_path / "c", read_only=True)):
        assert (checkpoints.steps, checkpoints.latest_step, checkpoints.best_step) == (kept, kept[-1], best)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == sorted(map(str, kept))


def test_several_of_the_newest_are_kept_where_they_are_wanted(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1):
        checkpoints.save(step, make_trees(step), metrics={"eval/loss": loss}, extra={})
    assert checkpoints.steps == [1, 4, 5, 6]
    checkpoints.close()


def test_what_an_interruption_saved_takes_no_place(tmp_path):
    """Of steps that are saved at every second, those that are odd were interruptions."""
    for folder, steps in (("unbroken", [2, 4, 6, 7]), ("broken", [2, 3, 4, 5, 6, 7])):
        checkpoints = Checkpoints(tmp_path / folder, keep=3, regular=lambda step: step % 2 == 0)
        for step in steps:
            checkpoints.save(step, make_trees(step), metrics=None, extra={})
            assert checkpoints.latest_step == step
        assert checkpoints.newest(3) == [4, 6, 7] and checkpoints.newest(1) == [7]
        checkpoints.close()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_the_mean_of_the_newest(saved_three, count):
    shapes = shapes_of(make_trees())["parameters"]
    mean, taken = Checkpoints(saved_three, read_only=True).restore_average(count, shapes, device())
    assert taken == min(count, 3)
    trees = [make_trees(step)["parameters"] for step in (1, 2, 3)[-taken:]]

    def assert_mean(ours, *theirs):
        assert ours.dtype == theirs[0].dtype
        expected = np.mean([np.array(leaf, np.float64) for leaf in theirs], axis=0)
        np.testing.assert_allclose(np.array(ours, np.float64), expected, rtol=0.02, atol=0.02)

    jax.tree.map(assert_mean, mean, *trees)
    np.testing.assert_allclose(
        mean["blocks"]["kernel"], np.mean([tree["blocks"]["kernel"] for tree in trees], axis=0), rtol=1e-5, atol=1e-6
    )


@pytest.fixture(scope="module")
def saved_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, make_trees(step), metrics=None, extra={})
    checkpoints.close()
    return folder


def test_a_resumed_run_still_knows_the_best(tmp_path):
    save(tmp_path / "c", [1.0, 3.0])
    save(tmp_path / "c", [2.0], start=3)
    assert Checkpoints(tmp_path / "c", read_only=True).steps == [1, 3]


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert (checkpoints.steps, checkpoints.latest_step, checkpoints.best_step) == ([], None, None)


def payloads(folder):
    """The files that hold the bytes of the arrays."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d")


def is_noticed(folder):
    """Whether restoring is refused, in one line that names the folder; if it is not, what was saved comes back."""
    try:
        trees, _ = restore(folder)
    except DamagedCheckpointError as error:
        message = str(error)
    else:
        assert_bit_equal(trees, make_trees(1))
        return False
    assert str(folder) in message and "\n" not in message
    return True


@orbax_leaves_coroutines
def test_a_flipped_bit_is_noticed(copy):
    """In every payload file, at several offsets: either an error, or (in unused bytes) what was saved."""
    files = payloads(copy / "1")
    assert files
    generator, noticed = np.random.default_rng(0), 0
    for file in files:
        data = file.read_bytes()
        for offset in generator.integers(0, len(data), 6).tolist():
            damaged = bytearray(data)
            damaged[offset] ^= 1 << int(generator.integers(8))
            file.write_bytes(damaged)
            noticed += is_noticed(copy)
        file.write_bytes(data)
    assert noticed
    assert_bit_equal(restore(copy)[0], make_trees(1))


def test_another_value_that_reads_well_is_noticed(tmp_path, saved):
    """What Orbax cannot see: a checkpoint whose arrays are those of another, whole and readable."""
    save(tmp_path / "c", [2.0], start=1)
    other = Checkpoints(tmp_path / "other")
    other.save(1, make_trees(9), metrics={"eval/loss": 2.0}, extra={})
    other.close()
    shutil.rmtree(tmp_path / "c" / "1" / "optimizer")
    shutil.copytree(tmp_path / "other" / "1" / "optimizer", tmp_path / "c" / "1" / "optimizer")
    with pytest.raises(DamagedCheckpointError, match=r"optimizer/.* does not have the checksum"):
        restore(tmp_path / "c")
    parameters = {"parameters": make_trees(1)["parameters"]}
    assert_bit_equal(restore(tmp_path / "c", shapes=shapes_of(parameters))[0], parameters)


@orbax_leaves_coroutines
@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_a_shortened_or_missing_file_is_noticed(copy, harm):
    noticed = 0
    for file in (path for path in sorted((copy / "1").rglob("*")) if path.is_file()):
        data = file.read_bytes()
        file.unlink()
        if harm == "truncate":
            file.write_bytes(data[: len(data) // 2])
        noticed += is_noticed(copy)
        file.write_bytes(data)
    assert noticed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p["blocks"].update(kernel=jnp.zeros((2, 3, 5))), "kernel"),
        (lambda p: p["blocks"].update(bias=jnp.zeros(3)), "bias"),
        (lambda p: p.pop("half"), "half"),
    ],
    ids=["another shape", "one more", "one less"],
)
def test_what_does_not_fit_is_named(saved, change, named):
    wanted = make_trees(1)
    change(wanted["parameters"])
    with pytest.raises(DamagedCheckpointError, match=named):
        restore(saved, shapes=shapes_of(wanted))


def test_a_step_that_is_not_there_is_said(saved):
    with pytest.raises(DamagedCheckpointError, match="2 cannot be read"):
        restore(saved, step=2)


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path):
    """Nor is it in the way of the next writer, which cleans it up."""
    folder = tmp_path / "c"
    save(folder, [1.0])
    left = "2.orbax-checkpoint-tmp"  # what Orbax calls a checkpoint that is not committed yet
    (folder / left / "parameters").mkdir(parents=True)
    reader = Checkpoints(folder, read_only=True)
    assert reader.steps == [1] and (folder / left).exists()  # a running writer's, for all a reader knows
    assert_bit_equal(reader.restore(1, shapes_of(make_trees(1)), device())[0], make_trees(1))
    writer = Checkpoints(folder)
    assert writer.steps == [1]
    writer.save(2, make_trees(2), metrics=None, extra={})
    writer.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_failed_save_is_an_error_and_the_one_before_is_good(tmp_path, step):
    """The disk is full (a limit on the size of files): OSError, at the latest when waiting; step 1 stays.

    Also where it was to be replaced.
    """
    program = f"""
import resource, jax, jax.numpy as jnp
from jaxgpt.storage.checkpoint import Checkpoints
checkpoints = Checkpoints(__import__("pathlib").Path({str(tmp_path / "c")!r}))
key = jax.random.key(0)
checkpoints.save(1, {{"a": jax.random.normal(key, (10,))}}, metrics=None, extra={{}})
checkpoints.wait()
big = {{"a": jax.random.normal(key, (1_000_000,))}}
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    checkpoints.save({step}, big, metrics=None, extra={{}})
    while True:
        checkpoints.check()  # it is noticed without a second save
except OSError as error:
    print("failed:", error)
print("steps:", checkpoints.steps)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"failed: the checkpoint of step {step} could not be written to {tmp_path / 'c'}: " in result.stdout
    assert "steps: [1]" in result.stdout  # and what failed is no checkpoint
    small = {"a": jax.random.normal(jax.random.key(0), (10,))}
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.steps == [1]
    assert_bit_equal(checkpoints.restore(1, shapes_of(small), device())[0], small)
    checkpoints.save(2, small, metrics=None, extra={})
    checkpoints.close()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["2"]


def test_a_checkpoint_is_saved_again_and_one_that_was_not_is_put_back(tmp_path):
    save(tmp_path, [1.0, 2.0])
    save(tmp_path, [3.0], start=2)
    assert [path.name for path in tmp_path.iterdir() if "." in path.name] == []
    old, new = tmp_path / "2", tmp_path / "2.replaced"
    old.rename(new)  # as where a process was killed before the new one was there
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step == 2 and not new.exists()
    checkpoints.close()
    shutil.copytree(old, new)  # or after
    checkpoints = Checkpoints(tmp_path)
    assert_bit_equal(checkpoints.restore(2, shapes_of(make_trees(2)), device())[0], make_trees(2))
    checkpoints.close()
    assert not new.exists()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def harm(folder, how):
    """Damage one checkpoint."""
    if how == "payload":
        flip(max(payloads(folder), key=lambda path: path.stat().st_size))
    elif how == "metrics":
        (folder / "metrics").mkdir()
        (folder / "metrics" / "metrics").write_text("{")
    elif how == "metadata":
        (folder / "_CHECKPOINT_METADATA").write_text("")
    else:
        shutil.rmtree(folder)
        folder.mkdir()


@orbax_leaves_coroutines
@pytest.mark.parametrize("how", ["payload", "metrics", "metadata", "empty folder"])
def test_the_newest_that_is_whole_is_found_and_the_others_are_kept_and_named(tmp_path, saved_three, how):
    folder = Path(shutil.copytree(saved_three, tmp_path / "c"))
    harm(folder / "3", how)
    with pytest.raises(DamagedCheckpointError, match=r"/3 cannot be read: .*--resume latest-good .* of step 2 or bef"):
        Checkpoints(folder, keep=3).restore(3, shapes_of(make_trees(3)), device())
    checkpoints = Checkpoints(folder, keep=3, good=True)
    step, trees, _ = checkpoints.restore_good(shapes_of(make_trees()), device())
    assert step == 2
    assert_bit_equal(trees, make_trees(2))
    (why,) = checkpoints.left_out
    assert f"{folder / '3'} cannot be read" in why and "3.damaged" in why and "latest-good" not in why
    assert checkpoints.steps == [1, 2] and (folder / "3.damaged").is_dir()
    checkpoints.save(3, make_trees(3), metrics=None, extra={})
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
    assert_bit_equal(restore(folder, step=3)[0], make_trees(3))


@orbax_leaves_coroutines
@pytest.mark.parametrize("how", ["payload", "metadata"])
def test_where_none_is_whole_all_stay(tmp_path, saved_three, how):
    folder = Path(shutil.copytree(saved_three, tmp_path / "c"))
    for step in (1, 2, 3):
        harm(folder / str(step), how)
    checkpoints = Checkpoints(folder, keep=3, good=True)
    with pytest.raises(DamagedCheckpointError, match=f"no checkpoint in {folder} is whole; the checkpoint {folder}/3 "):
        checkpoints.restore_good(shapes_of(make_trees()), device())
    assert checkpoints.steps == [1, 2, 3]


def test_where_no_metrics_are_readable_all_stay(tmp_path, saved_three):
    folder = Path(shutil.copytree(saved_three, tmp_path / "c"))
    for step in (1, 2, 3):
        harm(folder / str(step), "metrics")
    with pytest.raises(DamagedCheckpointError, match="metrics is damaged"):
        Checkpoints(folder, keep=3, good=True)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


class OneOfTwo(Hosts):
    """A host that is well, and another that cannot do the action of number `index`."""

    def together(self, action):
        result, number = action(), next(self.keys)
        if number == self.index:
            raise ValueError("process 1: it is not what was saved")
        return result


@pytest.mark.parametrize("fails", range(3), ids=["metadata", "arrays", "checksums"])
def test_what_one_host_cannot_read_is_read_on_none(saved_three, tmp_path, fails):
    folder = Path(shutil.copytree(saved_three, tmp_path / "c"))
    checkpoints = Checkpoints(
        folder, keep=3, good=True, hosts=OneOfTwo(fails, keys=itertools.count(-1))
    )  # the first is opening
    assert checkpoints.restore_good(shapes_of(make_trees()), device())[0] == 2
    assert "process 1: it is not what was saved" in checkpoints.left_out[0]


def test_a_save_that_fails_by_a_timeout_is_an_error_like_any_other(tmp_path):
    """Orbax has limits of its own; this is no wait that was too short."""

    class TooLate:
        def result(self, timeout):
            raise TimeoutError("not committed in 1200 seconds")

    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints._pending, checkpoints._step = TooLate(), 7
    checkpoints.check()
    with pytest.raises(OSError, match=r"the checkpoint of step 7 could not be written to .*: not committed in 1200"):
        checkpoints.wait()
    checkpoints.close()


def test_a_checkpoint_of_another_format_is_said_to_be_that_and_stays(tmp_path, saved_three):
    folder = Path(shutil.copytree(saved_three, tmp_path / "c"))
    file = folder / "3" / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"] = {"format": 99}
    file.write_text(json.dumps(metadata))
    for read in (
        lambda: Checkpoints(folder, read_only=True).restore(3, shapes_of(make_trees()), device()),
        lambda: Checkpoints(folder, keep=3, good=True).restore_good(shapes_of(make_trees()), device()),
    ):
        with pytest.raises(UnknownFormatError, match=f"{folder}/3 cannot be read: it is of format 99, and this"):
            read()
    assert (folder / "3").is_dir()


@orbax_leaves_coroutines
def test_metrics_that_are_others_are_noticed(copy):
    """A digit of what decides the best checkpoint."""
    file = copy / "1" / "metrics" / "metrics"
    file.write_text(file.read_text().replace("2.0", "1.0"))
    assert is_noticed(copy)


def test_a_checkpoint_can_be_saved_again(tmp_path):
    save(tmp_path / "c", [2.0, None], start=1)
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(2, make_trees(7), metrics={"eval/loss": 1.0}, extra={})
    assert checkpoints.steps == [2] and checkpoints.best_step == 2
    checkpoints.close()
    assert_bit_equal(restore(tmp_path / "c", step=2, shapes=shapes_of(make_trees()))[0], make_trees(7))


def test_the_best_may_be_the_highest_of_another_figure(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, metric="eval/accuracy", highest=True)) as checkpoints:
        for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7)):
            checkpoints.save(step, make_trees(step), metrics={"eval/accuracy": accuracy}, extra={})
        assert checkpoints.best_step == 2 and checkpoints.steps == [2, 3]
