"""What is read out of a compiled program: bytes sent, in each spelling, as often as the loop around runs."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt.compiled import collective_bytes, compile_step, shard_bytes, topology_devices
from jaxgpt.config import DataConfig, GPTConfig, TrainConfig
from jaxgpt.models.sharding import make_mesh

ROWS, SIZE = 64, 128


def program(mesh, turns):
    """A product over a cut axis, which all devices add up, once or in a loop."""

    def one(x, w):
        product = jnp.tanh(x @ w)
        return jax.lax.with_sharding_constraint(product, NamedSharding(mesh, PartitionSpec(None, "fsdp")))

    def several(x, w):
        return jax.lax.scan(lambda x, _: (one(x, w), None), x, None, length=turns)[0]

    by_columns = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    by_rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((ROWS, SIZE), (SIZE, SIZE))]
    compiled = jax.jit(several if turns > 1 else one, in_shardings=(by_columns, by_rows)).lower(*shapes).compile()
    return compiled.as_text()


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("turns", [1, 7])
def test_sums_over_devices_count_as_often_as_they_happen(devices, turns):
    mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
    once = 4 * ROWS * SIZE * 2 * (devices - 1) / devices
    assert collective_bytes(program(mesh, turns)) == pytest.approx(turns * once)


HLO = """HloModule m
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = bf16[16,32]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %done = bf16[16,32]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %merged = f32[6]{0} all-reduce(%v), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}
%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
ENTRY %main.2 (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition.1, body=%body.1
  %rs = f32[4,8]{1,0} reduce-scatter(%y), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %ar = (f32[8]{0}, f32[2,2]{1,0}) all-reduce(%z, %q), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'a'}
}
"""


def test_every_spelling_is_read():
    gathered, scattered, summed = 5 * (16 * 32 * 2 + 2 * 6 * 4) * 3 / 4, 4 * 8 * 4 * 1, 2 * (8 + 4) * 4 * 3 / 4
    assert collective_bytes(HLO) == gathered + scattered + summed


def test_bytes_of_a_part():
    tree = {
        "qkv": {"kernel": jax.ShapeDtypeStruct((2, 8, 24), jnp.float32)},
        "bias": jax.ShapeDtypeStruct((8,), "int8"),
    }
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
    assert shard_bytes(tree, mesh) == 2 * 2 * 12 * 4 + 8


def test_a_step_compiles_for_a_mesh():
    config = TrainConfig(
        model=GPTConfig(vocab_size=32, context=8, layers=1, heads=2, width=16), data=DataConfig(batch_size=8)
    )
    alone, shared = (compile_step(config, make_mesh({"fsdp": n}, jax.devices()[:n])) for n in (1, 8))
    assert alone.collective_bytes == 0 < shared.collective_bytes
    assert shared.argument_bytes < alone.argument_bytes / 3
    assert math.isfinite(shared.temporary_bytes)


def test_a_topology_is_described_or_refused_in_words():
    pytest.importorskip("libtpu", reason="the extra plan is not installed")
    assert len(topology_devices("v5e:2x2")) == 4
    with pytest.raises(ValueError, match="there is no TPU topology v5e:3x3"):
        topology_devices("v5e:3x3")


def test_without_libtpu_it_says_what_to_install():
    try:
        import libtpu  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"jaxgpt\[plan\]"):
            topology_devices("v5e:2x2")
