"""Several processes train as one: the same losses, the same end for all, and one that speaks."""

from __future__ import annotations

import queue
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from program import SMALL, end_two, free_port, metrics, run, start, start_two, wait_for, write_text

from jaxgpt.config import HostsConfig, TrainConfig, TranslationConfig, flatten
from jaxgpt.hosts import GONE, Hosts, SharedStop, connect, detected, without_hosts

COMMON = f"{SMALL} --model.layers 1 --model.dropout 0.2 --data.batch-size 8 --log-interval 1 --model.vocab-size 258"
LAUNCHERS = ("SLURM", "OMPI", "KUBERNETES", "JOB_", "TPU_", "JAX_COORDINATOR")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_two_processes_have_the_losses_of_one_device(tmp_path, cache, text):
    common = f"{COMMON} --data.path {text} --steps 20 --eval-interval 10"
    run(f"{common} --quiet --out {tmp_path / 'one'}", cache)
    mesh = "--parallel.mesh fsdp=2,tensor=2"
    (out, _), other = end_two(start_two(f"{common} {mesh} --out {tmp_path / 'two'}", cache, devices=2), 0, 0)
    assert "a sample" in out and "4 x " in out and other[0] == ""
    for name in ("train/loss", "gradient_norm", "eval/loss"):
        ours, theirs = metrics(tmp_path / "two", name), metrics(tmp_path / "one", name)
        assert list(ours) == list(theirs)
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5, err_msg=name)


def test_a_signal_to_one_stops_both_at_a_step_and_one_that_is_killed_ends_the_other(tmp_path, cache, text):
    folder = tmp_path / "run"
    common = f"--out {folder} --sample-tokens 0 --steps 100000 --eval-interval 100000 --checkpoint-interval 50"
    both = start_two(f"{COMMON} --data.path {text} {common}", cache)
    wait_for(both, folder / "metrics.jsonl")
    both[1].send_signal(signal.SIGTERM)
    (out, _), other = end_two(both, 75, 75)
    (saved,) = (int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    assert f"stopped at step {saved:,} and saved" in out and other[0] == ""  # JAX notes the signal on stderr

    both = start_two(f"{common} --resume --hosts.heartbeat 5", cache)
    later = saved + 50 - saved % 50
    wait_for(both, folder / "checkpoints" / str(later))
    both[1].kill()
    (_, err), _ = end_two(both, 1, -signal.SIGKILL)
    assert err.splitlines()[-1] == f"jaxgpt: {GONE}"

    out, _ = run(f"--out {folder} --resume --steps {later + 60}", cache)
    assert f"resuming at step {later:,}" in out or f"resuming at step {later + 50:,}" in out
    assert list(metrics(folder)) == list(range(1, later + 61))


def test_processes_that_do_not_belong_together_end_with_a_line_of_the_first(tmp_path, cache, text):
    common = f"{COMMON} --data.path {text} --steps 3"
    apart = (tmp_path / "a", tmp_path / "b")
    for folder in apart:
        folder.mkdir()
    # Both pairs at once: most of what they do is waiting.
    other_seed = start_two(f"{common} --out {tmp_path / 'run'}", cache, own=("", "--seed 7"))
    other_disk = start_two(f"{common} --out run", cache, cwd=apart)
    no_mesh = start_two(f"{common} --out {tmp_path / 'run'} --parallel.mesh data=8", cache)
    for both, words in (
        (other_seed, "need the same seed: process 0 has 1337, process 1 has 7"),
        (other_disk, "the run folder run is not one that all processes share"),
        (no_mesh, "parallel.mesh data=8 needs 8 devices, but there are 2 to use"),
    ):
        (_, err), (other_out, other_err) = end_two(both, 2, 2)
        (line,) = (line for line in err.splitlines() if line.startswith("jaxgpt:"))
        assert words in line
        assert other_out == "" and "jaxgpt:" not in other_err
    assert not (tmp_path / "run").exists()
    assert not list(apart[0].rglob("*.json")) and not list(apart[1].iterdir())


def test_a_coordinator_that_does_not_answer_is_named(tmp_path, cache, text):
    where = f"127.0.0.1:{free_port()}"
    flags = f"--hosts.coordinator {where} --hosts.processes 2 --hosts.timeout 1 --hosts.process"
    waiting = [start(f"{COMMON} --data.path {text} {flags} {number}", cache) for number in (1,)]
    _, err = waiting[0].communicate(timeout=120)
    assert waiting[0].returncode == 2
    assert err == f"jaxgpt: the coordinator {where} did not answer within 1 s (--hosts.timeout)\n"


def test_a_signal_before_the_first_step_of_a_resumed_run_is_not_forgotten(monkeypatch):
    """JAX has agreed on call 1, as there had been none; whatever the step is, that call is made, and only by the loop.

    Orbax's calls would be of steps, and from a thread of process 0 alone.
    """
    from jax.experimental import multihost_utils

    calls = []
    sync_point = lambda number: calls.append(number) or number == 1  # noqa: E731
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", sync_point)
    monkeypatch.setattr("jaxgpt.hosts.ending._CALLS", iter(range(1, 9)))
    with SharedStop() as stop:
        assert not multihost_utils.reached_preemption_sync_point(500) and calls == []
        assert stop.ask() and stop.requested and stop.ask() and calls == [1]
    assert multihost_utils.reached_preemption_sync_point is sync_point


class Store:
    """A key-value store in memory, in place of the coordinator's."""

    def __init__(self) -> None:
        self._values: dict[str, queue.Queue[str]] = {}
        self._lock = threading.Lock()

    def _of(self, key: str) -> queue.Queue[str]:
        with self._lock:
            return self._values.setdefault(key, queue.Queue())

    def key_value_set(self, key: str, value: str) -> None:
        self._of(key).put(value)

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        value = self._of(key).get(timeout=10)
        self._of(key).put(value)
        return value


def on_all(count, action):
    """What `action` returns, or the error it raises, on each of so many hosts."""
    store = Store()

    def one(index):
        try:
            return action(Hosts(index, count, store, (str(number) for number in range(100))))
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_what_hosts_tell_each_other():
    assert (
        on_all(3, lambda hosts: (hosts.gather([hosts.index]), hosts.of_first(hosts.index + 5)))
        == [([[0], [1], [2]], 5)] * 3
    )
    assert Hosts().gather("a") == ["a"] and Hosts().together(lambda: 3) == 3

    def fails_on_the_last(hosts):
        def action():
            if hosts.index == 2:
                raise FileNotFoundError("there is no text.txt")
            return hosts.index

        return hosts.together(action)

    assert on_all(3, fails_on_the_last) == ["ValueError: process 2: there is no text.txt"] * 2 + [
        "FileNotFoundError: there is no text.txt"
    ]
    assert (
        on_all(2, lambda hosts: hosts.compare({"a": 1, "b": hosts.index}))
        == ["ValueError: the processes of a run need the same b: process 0 has 0, process 1 has 1"] * 2
    )
    assert on_all(2, lambda hosts: hosts.compare({"a": 1})) == [None, None]


def test_a_folder_that_all_see_is_shared(tmp_path):
    assert on_all(3, lambda hosts: hosts.check_shared(tmp_path)) == [None] * 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # the batch script, not a task of it
        ({"SLURM_STEP_NUM_TASKS": "4"}, "Slurm"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # some pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_a_launcher_is_detected_by_what_it_sets(monkeypatch, environ, launcher):
    import os

    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert detected() == launcher
    if launcher is None:
        assert connect("auto", HostsConfig()) == Hosts()
    assert connect("off", HostsConfig(coordinator="a:1")) == Hosts()


def test_one_of_several_that_does_not_know_the_others_is_refused(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    for mode, config in (("on", HostsConfig()), ("auto", HostsConfig(processes=2, process=1))):
        with pytest.raises(ValueError, match=f"distributed is {mode}, but the processes could not be joined"):
            connect(mode, config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "10.0.0.1"}, "hosts.coordinator is 10.0.0.1; it must be ADDRESS:PORT"),
        ({"coordinator": "a:99999"}, "it must be ADDRESS:PORT"),
        ({"processes": 0}, "hosts.processes is 0; it must be at least 1"),
        ({"processes": 2, "process": 2}, "hosts.process is 2, and the 2 of hosts.processes are numbered from 0"),
        ({"process": -1}, "hosts.process is -1"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HostsConfig(**values)


@pytest.mark.parametrize("kind", [TrainConfig, TranslationConfig])
def test_a_run_does_not_keep_where_it_ran(kind):
    config = kind(distributed="on", hosts=HostsConfig("a:1", 2, 1, 5, 6), seed=3)
    assert flatten(without_hosts(config)) == flatten(kind(seed=3))
