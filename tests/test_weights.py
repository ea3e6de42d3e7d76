"""Published weights: what is written is read back bit for bit, what is damaged or does not fit is named."""

import dataclasses
import functools
import json
import struct

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_huggingface import random_config

from jaxgpt.models.gpt import init_parameters
from jaxgpt.storage.weights import (
    WEIGHTS,
    export_tensors,
    fitting_config,
    open_weights,
    read_json,
    read_parameters,
    write_weights,
)

FLOAT32 = np.dtype(np.float32)


def random_leaves(config, seed=0):
    shapes = jax.eval_shape(functools.partial(init_parameters, config), jax.random.key(0))
    rng = np.random.default_rng(seed)
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    return {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in flat.items()}


def read(folder, config, dtype=FLOAT32):
    shapes = {name: leaf.shape for name, leaf in random_leaves(config).items()}
    return read_parameters(open_weights(folder), config, shapes, dtype, lambda leaf: leaf)


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


@pytest.fixture
def exported(tmp_path):
    """A model's folder: config, leaves, and the tensors as the file has them."""
    config = dataclasses.replace(random_config(0), tied_head=True, bias=True)
    leaves = random_leaves(config)
    write_weights(tmp_path, export_tensors(config, leaves))
    return tmp_path, config, leaves


def rewrite(folder, change, **metadata):
    """Write the same file without checksums and with its tensors changed."""
    tensors = dict(safetensors.numpy.load_file(folder / WEIGHTS))
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata=metadata or None)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_written_is_read_bit_for_bit(tmp_path, seed):
    config = random_config(seed)
    leaves = random_leaves(config, seed)
    write_weights(tmp_path, export_tensors(config, leaves))
    assert fitting_config(open_weights(tmp_path), config) == config
    assert equal(read(tmp_path, config), leaves)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types_are_converted(exported, dtype):
    folder, config, leaves = exported

    def change(tensors):
        tensors.update({name: tensor.astype(dtype) for name, tensor in tensors.items()})

    rewrite(folder, change)
    assert equal(read(folder, config), {n: leaf.astype(dtype).astype(np.float32) for n, leaf in leaves.items()})


def test_old_files_have_no_prefix_and_masks_in_them(exported):
    folder, config, leaves = exported

    def change(tensors):
        plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(plain)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 3, 3), np.uint8)
        tensors["h.0.attn.masked_bias"] = np.full(1, -1e4, np.float32)
        tensors["lm_head.weight"] = plain["wte.weight" if config.norm == "pre" else "tokens_embed.weight"].copy()
        tensors["score.weight"] = np.ones((2, 2), np.float32)

    rewrite(folder, change)
    assert equal(read(folder, config), leaves)


def test_shards_are_found_by_their_index(exported):
    folder, config, leaves = exported
    split_into_shards(folder)
    assert equal(read(folder, config), leaves)


def split_into_shards(folder):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    where = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for shard in set(where.values()):
        safetensors.numpy.save_file({n: t for n, t in tensors.items() if where[n] == shard}, folder / shard)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))


def test_a_missing_shard_is_named(exported):
    folder, config, _ = exported
    split_into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model-00002-of-00002.safetensors"):
        read(folder, config)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b"])
def test_an_index_does_not_lead_elsewhere(tmp_path, name):
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(ValueError, match="names the shard"):
        open_weights(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_is_none_is_refused(tmp_path, index):
    (tmp_path / f"{WEIGHTS}.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json"):
        open_weights(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, a format that can run any code.*convert it"):
        open_weights(tmp_path)


def test_no_weights_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        open_weights(tmp_path)


def header_of(whole):
    size = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def with_header(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def lies(whole):
    """Files whose header is not true, by what is wrong with it."""
    header, data = header_of(whole)
    name = next(name for name in header if name != "__metadata__")
    begin, end = header[name]["data_offsets"]
    yield "size of the header", struct.pack("<Q", 2**62) + whole[8:]
    yield "no JSON", struct.pack("<Q", 10) + b"{" * 10 + data
    for key, value in [
        ("data_offsets", [begin, end + 4]),
        ("data_offsets", [begin + 4, end]),
        ("data_offsets", [-4, end]),
        ("data_offsets", [begin, 2**62]),
        ("shape", [1, 2, 3, 5, 7]),
        ("shape", [2**40, 2**40]),
        ("dtype", "F31"),
    ]:
        yield f"{key} {value}", with_header(header | {name: header[name] | {key: value}}, data)


def test_a_header_that_lies_is_refused(exported):
    folder, config, _ = exported
    whole = (folder / WEIGHTS).read_bytes()
    for what, damaged in lies(whole):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=WEIGHTS):
            pytest.fail(f"read in spite of {what}: {read(folder, config)}")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_refused(exported, share):
    folder, config, _ = exported
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        read(folder, config)


def test_a_flipped_bit_is_seen(exported):
    folder, config, leaves = exported
    whole = (folder / WEIGHTS).read_bytes()
    rng = np.random.default_rng(0)
    for place in [len(whole) - 1, *rng.integers(0, len(whole), 60)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            assert equal(read(folder, config), leaves), "nothing wrong may come out"
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017  (not every bit matters: a space in the header)


def test_types_that_are_no_floats_are_refused(exported):
    folder, config, _ = exported
    rewrite(folder, lambda tensors: tensors.update({"transformer.wte.weight": np.ones((2, 2), np.int32)}))
    with pytest.raises(ValueError, match=r"wte.weight is of type I32; there are F64, F32, F16, BF16"):
        read(folder, config)


def test_what_does_not_fit_is_named(exported):
    folder, config, _ = exported
    name = "transformer.h.0.mlp.c_fc.weight"
    whole = (folder / WEIGHTS).read_bytes()
    for change, message in [
        (
            lambda t: t.update({name: t[name][:, :-1].copy()}),
            r"h.0.mlp.c_fc.weight has the shape \(.*and the config asks",
        ),
        (lambda t: t.pop(name), "no tensor h.0.mlp.c_fc.weight"),
        (lambda t: t.update({"transformer.h.99.ln_1.bias": np.ones(3, np.float32)}), "a tensor h.99.ln_1.bias"),
        (lambda t: t.update({"lm_head.weight": np.ones((2, 3), np.float32)}), "the file holds another"),
        (lambda t: t.update({name.removeprefix("transformer."): t[name]}), "both have the tensor h.0.mlp.c_fc.weight"),
    ]:
        (folder / WEIGHTS).write_bytes(whole)
        rewrite(folder, change)
        with pytest.raises(ValueError, match=message):
            read(folder, config)


def test_biases_that_someone_trained_elsewhere_are_kept(tmp_path):
    config = dataclasses.replace(random_config(0), bias=False)
    write_weights(tmp_path, export_tensors(config, random_leaves(config)))
    assert not fitting_config(open_weights(tmp_path), config).bias
    rewrite(tmp_path, lambda tensors: tensors["transformer.h.0.ln_1.bias"].__setitem__(0, 0.5))
    biased = fitting_config(open_weights(tmp_path), config)
    assert biased.bias and read(tmp_path, biased)["blocks/attention_norm/bias"][0, 0] == 0.5


def test_json_that_is_none_is_named(tmp_path):
    for text in ("{", "[1]", "\x00", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json"):
            read_json(tmp_path / "config.json")
