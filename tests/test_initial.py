"""What training begins with: the same from the same seed, and the base's own values where there is one."""

import dataclasses

import jax
import numpy as np

from jaxgpt.config import AdaptConfig, FinetuneConfig, GPTConfig
from jaxgpt.models.gpt import init_parameters
from jaxgpt.models.partition import combine
from jaxgpt.storage.leaves import by_path
from jaxgpt.tasks import initial

BASE = GPTConfig(vocab_size=19, context=8, layers=2, heads=1, width=4, tied_head=False)
CONFIG = FinetuneConfig(
    model=dataclasses.replace(BASE, vocab_size=22), labels=("a", "b", "c"), adapt=AdaptConfig("lora"), init_from="x"
)


def test_a_base_keeps_its_values_and_gets_new_rows_head_and_adapter():
    base = init_parameters(BASE, jax.random.key(1))
    before = jax.tree.map(np.array, base)
    trained, frozen = initial.separated(CONFIG, jax.random.key(0), base)
    assert trained.keys() == {"task_head", "adapter"}
    whole = by_path(combine(trained, frozen))
    for name, leaf in by_path(before).items():
        np.testing.assert_array_equal(
            whole[name][:19] if name in ("head", "token_embedding/embedding") else whole[name], leaf
        )
    for name in ("head", "token_embedding/embedding"):
        assert whole[name].shape == (22, 4) and np.all(whole[name][19:] != 0)
    assert whole["task_head/kernel"].shape == (4, 3)
    jax.tree.map(np.testing.assert_array_equal, base, before)


def test_it_is_a_function_of_the_key():
    base = init_parameters(BASE, jax.random.key(1))
    one, same, other = (by_path(combine(*initial.separated(CONFIG, jax.random.key(k), base))) for k in (0, 0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
    assert not np.array_equal(one["task_head/kernel"], other["task_head/kernel"])


def test_shapes_do_not_need_the_base():
    shapes = jax.eval_shape(lambda: initial.separated(CONFIG, jax.random.key(0), None))
    base = init_parameters(BASE, jax.random.key(1))
    made = jax.eval_shape(lambda: initial.separated(CONFIG, jax.random.key(0), base))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, made)
