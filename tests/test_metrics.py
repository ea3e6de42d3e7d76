"""What a model costs: counts are those of the real parameters and the real matrix products."""

import dataclasses
import math
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.config import DataConfig, GPTConfig, ParallelConfig, TrainConfig
from jaxgpt.models.gpt import GPT, init_parameters, output_head
from jaxgpt.models.losses import unembed
from jaxgpt.training.metrics import (
    PEAK_FLOPS,
    chip_peak_flops,
    count_parameters,
    estimate_training_bytes,
    training_flops_per_token,
)

MODEL = GPTConfig(vocab_size=30, context=8, layers=3, heads=2, width=12, hidden=20, unroll=1)


@pytest.mark.parametrize("change", [{}, {"bias": False}, {"tied_head": False}, {"positions": "sinusoidal"}])
def test_parameters_are_counted(change):
    parameters = init_parameters(dataclasses.replace(MODEL, **change), jax.random.key(0))
    assert count_parameters(parameters) == sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert count_parameters(jax.eval_shape(lambda: parameters)) == count_parameters(parameters)


def matmul_flops(jaxpr):
    """Floating-point operations of all matrix products in a program: 2 x (size of the result) x (length of the sum).

    Those with a vector of ones are sums, written so because they are faster.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, right = (variable.aval.shape for variable in equation.invars)
            length = math.prod(left[i] for i in contracted)
            if length in (math.prod(left), math.prod(right)):
                continue
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        repeated = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                total += repeated * matmul_flops(getattr(inner, "jaxpr", inner))
    return total


@pytest.mark.parametrize("change", [{}, {"layers": 1, "hidden": None}, {"tied_head": False}])
def test_flops_are_three_times_those_of_the_forward_pass(change):
    """The backward pass multiplies each matrix twice more; the reference attention computes every score."""
    config = dataclasses.replace(MODEL, attention="reference", **change)

    def forward(tokens):
        parameters = GPT(config).init(jax.random.key(0), tokens)["params"]
        hidden, _ = GPT(config).apply({"params": parameters}, tokens)
        return unembed(hidden, output_head(parameters))

    def init(tokens):
        return GPT(config).init(jax.random.key(0), tokens)["params"]

    tokens = jnp.zeros((2, 7), jnp.int32)
    flops = [matmul_flops(jax.make_jaxpr(function)(tokens).jaxpr) for function in (forward, init)]
    assert 3 * (flops[0] - flops[1]) == 2 * 7 * training_flops_per_token(config, 7, 30)


def test_flops_by_hand():
    """Width 4, hidden 16, 10 tokens: 4x12 + 4x4 + 4x16 + 16x4 = 192 and the head's 40; 5 positions of attention."""
    config = GPTConfig(vocab_size=10, context=5, layers=1, heads=1, width=4)
    assert training_flops_per_token(config, 5, 10) == 6 * 232 + 12 * 5 * 4


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_chips_are_looked_up_by_their_name(kind, peak):
    assert chip_peak_flops(Mock(spec=jax.Device, device_kind=kind)) == peak


def test_no_chip_hides_another():
    names = list(PEAK_FLOPS)
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]
    assert chip_peak_flops(jax.devices()[0]) is None


def test_memory_grows_with_what_takes_it():
    config = TrainConfig(model=MODEL, data=DataConfig(batch_size=64))

    def memory(parameters=1000, devices=1, **changes):
        return estimate_training_bytes(dataclasses.replace(config, **changes), parameters, 30, devices)

    assert memory(2000) - memory(1000) == 16 * 1000  # parameter, two moments, gradient
    activations = memory(0)
    assert memory(0, devices=4) * 4 == activations
    assert memory(0, parallel=ParallelConfig(gradient_accumulation=8)) * 8 == activations
    assert memory(0, data=DataConfig(batch_size=128)) == 2 * activations
    assert memory(0, model=dataclasses.replace(MODEL, remat=True)) < activations
    assert memory(0, model=dataclasses.replace(MODEL, compute_dtype="bfloat16")) < activations
