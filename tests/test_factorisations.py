"""A few of the meshes that `python tests/factorisations.py` goes through, in fewer steps."""

import functools

import factorisations
import pytest

from jaxgpt.config import ParallelConfig

STEPS = 6


@functools.cache
def on_one_device(kind):
    return factorisations.train(kind, ParallelConfig("single"), STEPS)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("gpt", (1, 2, 4)), ("gpt", (2, 2, 2)), ("encoder-decoder", (1, 4, 2)), ("gpt, adapters", (2, 4, 1))],
)
def test_a_mesh_computes_what_one_device_does_and_each_device_holds_its_part(kind, shape):
    factorisations.compare(kind, shape, on_one_device(kind))


def test_all_factorisations_are_there():
    shapes = list(factorisations.factorisations(8))
    assert len(shapes) == len(set(shapes)) == 10 and all(d * f * t == 8 for d, f, t in shapes)
