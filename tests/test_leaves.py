"""Names and checksums of a tree's leaves."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxgpt  # noqa: F401  (sets XLA's flags)
from jaxgpt.storage.leaves import by_path, checksums


def tree_of(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    half = jax.random.normal(keys[1], (5, 7)).astype(jnp.bfloat16)
    return {"blocks": {"kernel": jax.random.normal(keys[0], (2, 3, 4))}, "half": half, "step": (jnp.int32(seed),)}


def test_leaves_are_named_by_their_path():
    tree = tree_of(2)
    assert by_path(tree) == {"blocks/kernel": tree["blocks"]["kernel"], "half": tree["half"], "step/0": tree["step"][0]}


def test_checksums_are_of_the_bytes():
    tree = tree_of(1)
    before = checksums(tree)
    assert before == checksums(jax.tree.map(np.asarray, tree)) and before.keys() == by_path(tree).keys()
    tree["half"] = tree["half"].at[2, 3].multiply(-1)
    after = checksums(tree)
    assert {name for name in before if before[name] != after[name]} == {"half"}
