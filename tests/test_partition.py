"""Parameters cut into those that are trained and those that stay are the same when put together again."""

import jax
import numpy as np
import pytest
from drawn import drawn

from jaxgpt.config import AdaptConfig, FinetuneConfig, GPTConfig
from jaxgpt.models.partition import combine, separate
from jaxgpt.storage.leaves import by_path
from jaxgpt.tasks import initial

METHODS = [AdaptConfig(), AdaptConfig("head"), AdaptConfig("lora", rank=2)]
METHODS += [AdaptConfig("last", last_layers=layers) for layers in (1, 2, 3)]


@pytest.mark.parametrize("adapt", METHODS, ids=lambda adapt: f"{adapt.method}-{adapt.last_layers}")
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_what_was_cut_is_put_together_again(adapt, norm):
    model = GPTConfig(vocab_size=19, context=8, layers=3, heads=1, width=4, norm=norm)
    config = FinetuneConfig(model=model, labels=("a", "b"), adapt=adapt, init_from="somewhere")
    whole = drawn(lambda key: combine(*initial.separated(config, key, None)))
    trained, frozen = separate(whole, adapt)
    again = by_path(combine(trained, frozen))
    assert again.keys() == by_path(whole).keys()
    for name, leaf in by_path(whole).items():
        np.testing.assert_array_equal(again[name], leaf, err_msg=name)
    count = sum(leaf.size for tree in (trained, frozen) for leaf in jax.tree.leaves(tree))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(whole)), "nothing is in both"
    assert "task_head" in trained


def test_without_anything_frozen_nothing_is_copied():
    parameters = {"a": np.zeros(3)}
    assert combine(*separate(parameters, AdaptConfig())) == {"a": parameters["a"]}
    assert combine(parameters, {})["a"] is parameters["a"]
