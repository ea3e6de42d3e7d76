"""The same step on any number of devices: losses agree, the state has no replica axis, donated memory is reused."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from program import ROOT

from jaxgpt.config import AdaptConfig, GPTConfig, OptimizerConfig, ParallelConfig
from jaxgpt.data.batches import Share
from jaxgpt.models.gpt import init_parameters
from jaxgpt.models.sharding import batch_sharding
from jaxgpt.tasks import lm
from jaxgpt.training import parallel
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import choose_layout, compiling
from jaxgpt.training.step import TrainState, evaluate_step, train_step

MODEL = GPTConfig(vocab_size=12, context=6, layers=1, heads=2, width=8, dropout=0.3, unroll=1)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10)
LOSS = functools.partial(lm.loss, MODEL, AdaptConfig())
ROWS = 8


def make_batch(step):
    """Weights that differ from row to row, so that no two devices have the same share of the tokens."""
    generator = np.random.default_rng(step)
    tokens = generator.integers(0, 12, (ROWS, 7)).astype(np.int32)
    weights = generator.uniform(0, 1, (ROWS, 6)).astype(np.float32)
    weights[:3] = 0
    row = np.arange(ROWS, dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "row": row}


def initial_parameters():
    return drawn(functools.partial(init_parameters, MODEL))


def initial_state(layout):
    parameters = initial_parameters()
    state = TrainState(jnp.zeros((), jnp.int32), parameters, OPTIMIZER.init(parameters))
    return jax.device_put(state, layout.shardings(state))


def run(config, steps=3):
    layout, accumulation = choose_layout(config, ROWS), config.gradient_accumulation
    step = functools.partial(train_step, loss=LOSS, optimizer=OPTIMIZER, seed=5, micro_batches=accumulation)
    program = layout.compile(step, scalars=1, donate=True)
    evaluation = layout.compile(functools.partial(evaluate_step, sums=functools.partial(LOSS, dropout_keys=None)))
    state, seen = initial_state(layout), []
    for number in range(steps):
        state, metrics = program(state, layout.place(make_batch(number)), np.float32(number))
        seen.append({name: float(value) for name, value in metrics.items()})
    held_out = [float(value) for value in evaluation(state.parameters, layout.place(make_batch(99)))]
    return seen, held_out, state


@pytest.mark.parametrize("config", [ParallelConfig("pmap", 2), ParallelConfig("mesh", mesh="data=2,fsdp=2,tensor=2")])
def test_for_decoding_every_array_is_whole(config):
    state = initial_state(choose_layout(config, ROWS))
    wanted, found = (
        jax.tree.leaves(tree) for tree in (drawn(functools.partial(init_parameters, MODEL)), state.parameters)
    )
    assert config.mesh is None or any(not leaf.is_fully_replicated for leaf in found)
    for one, other in zip(wanted, jax.tree.leaves(parallel.on_one_device(state.parameters)), strict=True):
        assert other.devices() == {jax.local_devices()[0]}
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def on_one_device():
    return run(ParallelConfig("single"))


@pytest.mark.parametrize(
    ("config", "devices"),
    [
        (ParallelConfig("pmap", 1), 1),
        (ParallelConfig("pmap", 2, gradient_accumulation=4), 2),
        (ParallelConfig("pmap", 4), 4),
        (ParallelConfig("pmap", 8), 8),
        (ParallelConfig("mesh", 8), 8),
        (ParallelConfig("mesh", 2, gradient_accumulation=2), 2),
        (ParallelConfig("mesh", mesh="fsdp=4"), 4),
        (ParallelConfig("mesh", mesh="tensor=2"), 2),
        (ParallelConfig("mesh", mesh="data=2,fsdp=2,tensor=2", gradient_accumulation=2), 8),
    ],
)
def test_any_number_of_devices_computes_the_same(on_one_device, config, devices):
    expected, expected_held_out, expected_state = on_one_device
    seen, held_out, state = run(config)
    for ours, theirs in zip(seen, expected, strict=True):
        for name in ("loss", "gradient_norm", "tokens"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(held_out, expected_held_out, rtol=1e-5)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(expected_state)]
    assert int(state.step) == 3
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {devices}


@pytest.mark.parametrize(("strategy", "devices"), [("single", None), ("pmap", 4), ("mesh", 4)])
def test_a_donated_state_is_gone_and_another_is_not(strategy, devices):
    layout = choose_layout(ParallelConfig(strategy, devices), ROWS)

    def step(state, batch, rate, *, reduce):
        total = reduce(jnp.sum(batch["x"]))
        return jax.tree.map(lambda x: x + rate * total, state)

    batch = {"x": np.ones((ROWS, 2), np.float32)}
    for donate in (True, False):
        state = {"a": jnp.zeros((4, 4)), "b": jnp.ones(3)}
        state = jax.device_put(state, layout.shardings(state))
        after = layout.compile(step, scalars=1, donate=donate)(state, layout.place(batch), np.float32(2))
        np.testing.assert_array_equal(after["a"], np.full((4, 4), 4 * ROWS))
        assert {leaf.is_deleted() for leaf in jax.tree.leaves(state)} == {donate}


@pytest.mark.parametrize(
    ("config", "batch_size", "strategy", "devices", "said"),
    [
        (ParallelConfig(), 8, "pmap", 8, False),
        (ParallelConfig(), 64, "pmap", 8, False),
        (ParallelConfig(), 12, "pmap", 6, True),
        (ParallelConfig(), 13, "single", 1, True),
        (ParallelConfig(), 1, "single", 1, True),
        (ParallelConfig(devices=4), 12, "pmap", 4, False),
        (ParallelConfig(devices=1), 12, "single", 1, False),
        (ParallelConfig(gradient_accumulation=4), 8, "pmap", 2, True),
        (ParallelConfig("single"), 13, "single", 1, False),
        (ParallelConfig("pmap", 1), 13, "pmap", 1, False),
        (ParallelConfig("mesh"), 16, "mesh", 8, False),
    ],
)
def test_devices_are_chosen_by_what_divides_the_batch(config, batch_size, strategy, devices, said):
    layout = choose_layout(config, batch_size)
    assert (layout.strategy, len(layout.devices)) == (strategy, devices)
    assert bool(layout.notes) == said
    if said:
        assert f"{batch_size}" in layout.notes[0] and f"using {devices}" in layout.notes[0]


@pytest.mark.parametrize(
    ("config", "batch_size", "message"),
    [
        (ParallelConfig(devices=9), 9, "parallel.devices is 9, but there are 8 local devices"),
        (ParallelConfig("pmap"), 12, "data.batch-size 12 does not divide over 8 devices;"),
        (ParallelConfig("mesh", 5), 12, "data.batch-size 12 does not divide over 5 devices;"),
        (ParallelConfig("pmap", 4, None, 2), 12, "data.batch-size 12 does not divide over 4 devices x 2 micro-batches"),
        (
            ParallelConfig("mesh", mesh="data=3"),
            8,
            "data.batch-size 8 does not divide over the 3 devices of parallel.mesh",
        ),
        (
            ParallelConfig("mesh", mesh="data=2,fsdp=8"),
            16,
            "parallel.mesh data=2,fsdp=8 needs 16 devices, but there are 8",
        ),
        (ParallelConfig("single", 2), 12, "parallel.strategy single runs on one device, not 2"),
        (
            ParallelConfig("auto", None, None, 5),
            12,
            "parallel.gradient-accumulation 5 does not divide data.batch-size 12",
        ),
        (ParallelConfig("single", None, None, 5), 12, "parallel.gradient-accumulation 5 does not divide"),
    ],
)
def test_what_does_not_divide_is_refused(config, batch_size, message):
    with pytest.raises(ValueError, match=message):
        choose_layout(config, batch_size)


@pytest.mark.parametrize(
    ("config", "batch_size", "places", "shares"),
    [
        (ParallelConfig(), 16, range(8), [(0, 4, 8), (4, 8, 8)]),
        (ParallelConfig(), 12, (0, 1, 2, 4, 5, 6), [(0, 3, 6), (3, 6, 6)]),
        (ParallelConfig("mesh", 1), 12, (0, 4), [(0, 1, 2), (1, 2, 2)]),
        (ParallelConfig(mesh="data=2,tensor=4"), 4, range(8), [(0, 1, 2), (1, 2, 2)]),
        (ParallelConfig(mesh="tensor=8"), 3, range(8), [(0, 1, 1), (0, 1, 1)]),
        (ParallelConfig(mesh="fsdp=2,tensor=2"), 4, (0, 1, 4, 5), [(0, 1, 2), (1, 2, 2)]),
    ],
)
def test_the_devices_of_two_hosts_are_one_mesh_and_each_host_has_its_rows(config, batch_size, places, shares):
    devices = jax.devices()
    hosts = [devices[:4], devices[4:]]
    layout = choose_layout(config, batch_size, hosts=hosts)
    assert layout.strategy == "mesh" and layout.devices == tuple(devices[place] for place in places)
    assert bool(layout.notes) == (batch_size == 12 and config.devices is None)
    assert [layout.share_of(own) for own in hosts] == [Share(*share) for share in shares]
    for own, share in zip(hosts, shares, strict=True):
        where = batch_sharding(layout.mesh).devices_indices_map((batch_size, 2))
        rows = {row for device in own if device in where for row in range(batch_size)[where[device][0]]}
        assert rows == set(range(batch_size)[Share(*share).rows(batch_size)])


@pytest.mark.parametrize(
    ("config", "batch_size", "message"),
    [
        (ParallelConfig("pmap"), 16, "parallel.strategy pmap is for one host, and there are 2"),
        (ParallelConfig("single"), 16, "parallel.strategy single is for one host, and there are 2"),
        (ParallelConfig(), 13, "data.batch-size 13 does not divide over 8 devices"),
        (ParallelConfig(mesh="data=3"), 12, "data=3 needs 3 devices, as many of each of 2 hosts"),
        (ParallelConfig(mesh="data=16"), 16, "data=16 needs 16 devices, but there are 8"),
        (ParallelConfig(mesh="tensor=2,data=3"), 12, "2 devices along tensor, which neither divide the 3 of a host"),
    ],
)
def test_what_does_not_fit_two_hosts_is_refused(config, batch_size, message):
    devices = jax.devices()
    with pytest.raises(ValueError, match=message):
        choose_layout(config, batch_size, hosts=[devices[:4], devices[4:]])


@pytest.mark.parametrize("config", [ParallelConfig(strategy="single"), ParallelConfig(mesh="data=2")], ids=str)
def test_what_is_compiled_beside_something_else_is_not_compiled_again(config):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **about: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    layout = choose_layout(config, 4)
    state = layout.initial(lambda: {"w": jnp.ones((7, 3))})
    batch = layout.place({"x": np.arange(4, dtype=np.float32)})
    program = layout.compile(lambda state, batch, factor, reduce: state["w"] + factor * batch["x"].sum(), scalars=1)
    try:
        before = len(compiled)
        with compiling(program, state, batch, np.float32(0)):
            pass
        ahead = len(compiled)
        np.testing.assert_array_equal(program(state, batch, np.float32(2)), np.full((7, 3), 13.0))
        assert len(compiled) == ahead > before
    finally:
        jax.monitoring.clear_event_listeners()


def test_what_fails_to_compile_fails_where_it_is_called():
    wrong = jax.jit(lambda x: x @ x)
    with compiling(wrong, jnp.ones((2, 3))):
        pass
    with pytest.raises(TypeError, match="same shape"):
        wrong(jnp.ones((2, 3)))


LEAVES = """
import threading

from jaxgpt.training.parallel import compiling


class NeverCompiled:
    trace = __call__ = lambda self: None

    def lower(self):
        threading.Event().wait()


with compiling(NeverCompiled()):
    raise KeyboardInterrupt
"""


def test_ctrl_c_does_not_wait_for_the_compiler():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, cwd=ROOT, timeout=100)
    assert done.returncode == 130
