"""Adapters alone in a folder: PEFT reads ours, we read PEFT's, and none is taken for that of another model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxgpt import api
from jaxgpt.api import LanguageModel
from jaxgpt.config import AdaptConfig, GPTConfig
from jaxgpt.data.tokenizer import byte_tokenizer
from jaxgpt.models.gpt import init_parameters
from jaxgpt.models.lora import ADAPTER, fold, init_adapter
from jaxgpt.reference import load_torch, logits
from jaxgpt.storage.adapters import read_adapter, write_adapter
from jaxgpt.storage.leaves import by_path
from jaxgpt.tasks.trained import fingerprint

CONFIG = GPTConfig(vocab_size=257, context=16, layers=2, heads=2, width=12, init_std=0.3, unroll=1)
ADAPTS = [AdaptConfig("lora", rank=2, alpha=3.0), AdaptConfig("lora", rank=3, targets=("out", "up", "down"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = LanguageModel(CONFIG, init_parameters(CONFIG, jax.random.key(0)), byte_tokenizer(), (256,))
    folder = tmp_path_factory.mktemp("base") / "model"
    api.export(model, folder)
    return folder


def random_adapter(adapt, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_adapter(CONFIG, adapt, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.array(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize("adapt", ADAPTS, ids=lambda adapt: "-".join(adapt.targets))
def test_it_comes_back_as_it_was(base, tmp_path, adapt):
    adapter, model = random_adapter(adapt), api.load(base)
    write_adapter(tmp_path / "adapter", adapt, by_path(adapter), str(base), fingerprint(model.parameters))
    read, leaves, named, _ = read_adapter(tmp_path / "adapter")
    assert named == str(base) and (read.rank, read.alpha, set(read.targets)) == (
        adapt.rank,
        adapt.alpha,
        set(adapt.targets),
    )
    for name, leaf in by_path(adapter).items():
        np.testing.assert_array_equal(leaves[name], leaf)
    loaded = by_path(api.load(tmp_path / "adapter").parameters)
    for name, leaf in by_path(fold({**model.parameters, ADAPTER: adapter}, adapt)).items():
        np.testing.assert_array_equal(loaded[name], leaf)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("adapt", ADAPTS, ids=lambda adapt: "-".join(adapt.targets))
def test_peft_computes_the_same_from_it(base, tmp_path, adapt):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    adapter, model = random_adapter(adapt), api.load(base)
    write_adapter(tmp_path / "adapter", adapt, by_path(adapter), str(base), fingerprint(model.parameters))
    theirs = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "adapter").eval()
    tokens = np.random.default_rng(1).integers(0, 257, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = logits(CONFIG, api.load(tmp_path / "adapter").parameters, jnp.array(tokens, jnp.int32))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    plain = logits(CONFIG, model.parameters, jnp.array(tokens, jnp.int32))
    assert np.abs(np.array(plain) - expected).max() > 0.01


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    adapt = ADAPTS[0]
    write_adapter(tmp_path / "adapter", adapt, by_path(random_adapter(adapt)), str(base), "0" * 64)
    with pytest.raises(ValueError, match=r"is for another model than .*: its base has the fingerprint 000000000000"):
        api.load(tmp_path / "adapter")
    other = dataclasses.replace(CONFIG, width=8, heads=1)
    model = LanguageModel(other, init_parameters(other, jax.random.key(0)), byte_tokenizer(), (256,))
    api.export(model, tmp_path / "other")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name: x for name, x in tensors.items() if "lora_B" not in name}, path)
    with pytest.raises(ValueError, match="is not whole: it has no blocks/attention/qkv/lora_b"):
        api.load(tmp_path / "adapter")
    safetensors.numpy.save_file(tensors, path)  # as PEFT's own, which has no fingerprint
    with pytest.raises(ValueError, match=r"does not fit .*other: blocks/attention/qkv/lora_[ab] is"):
        api.load(tmp_path / "adapter", base=str(tmp_path / "other"))


def test_what_is_no_adapter_of_ours_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="describes an adapter of type 'IA3'; there is LORA"):
        read_adapter(tmp_path)
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    for name, value in (("use_rslora", True), ("alpha_pattern", {"c_attn": 4})):
        (tmp_path / "adapter_config.json").write_text(json.dumps(described | {name: value}))
        with pytest.raises(ValueError, match=f"has {name} .*, which is not here"):
            read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | {"use_rslora": False, "alpha_pattern": {}}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_adapter(tmp_path)
