"""safetensors files: read leaf by leaf, whatever wrote them, and refused when anything is wrong with them."""

import dataclasses
import hashlib
import json
import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxgpt.config import GPTConfig
from jaxgpt.storage.huggingface import tensor_names
from jaxgpt.storage.weights import export_tensors, fitting_config, open_weights, read_parameters, write_weights

SMALL = GPTConfig(vocab_size=11, context=5, layers=2, heads=2, width=4)
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shapes_of(c):
    """Shapes of the leaves, from the definition of the model."""
    d, f = c.width, c.hidden_width
    block = {"attention_norm/scale": (d,), "attention_norm/bias": (d,), "mlp_norm/scale": (d,), "mlp_norm/bias": (d,)}
    block |= {"attention/qkv/kernel": (d, 3 * d), "attention/qkv/bias": (3 * d,)}
    block |= {"attention/out/kernel": (d, d), "attention/out/bias": (d,)}
    block |= {"mlp/up/kernel": (d, f), "mlp/up/bias": (f,), "mlp/down/kernel": (f, d), "mlp/down/bias": (d,)}
    shapes = {"token_embedding/embedding": (c.vocab_size, d), "position_embedding/embedding": (c.context, d)}
    shapes |= {f"blocks/{path}": (c.layers, *shape) for path, shape in block.items()}
    shapes |= {"head": (c.vocab_size, d), "final_norm/scale": (d,), "final_norm/bias": (d,)}
    return {path: shapes[path] for path in tensor_names(c)}


def leaves_of(config, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in shapes_of(config).items()}


def read(folder, config=SMALL, dtype=np.float32, place=lambda leaf: leaf):
    return read_parameters(open_weights(folder), config, shapes_of(config), np.dtype(dtype), place)


def assert_same(leaves, others):
    assert leaves.keys() == others.keys()
    for path, leaf in leaves.items():
        assert others[path].dtype == leaf.dtype and others[path].shape == leaf.shape, path
        assert others[path].tobytes() == leaf.tobytes(), path


def random_config(seed):
    rng = np.random.default_rng(seed)
    vocabulary, context, layers, heads, width = rng.integers(1, 6, 5).tolist()
    bias, tied, post = (rng.random(3) < 0.5).tolist()
    hidden = None if post or rng.random() < 0.5 else int(rng.integers(1, 9))
    return GPTConfig(
        vocab_size=vocabulary, context=context, layers=layers, heads=heads, width=heads * width, hidden=hidden,
        bias=bias, tied_head=tied or post, norm="post" if post else "pre",
    )  # fmt: skip


@pytest.fixture
def tensors():
    """What our export of SMALL holds, by transformers' names."""
    return export_tensors(SMALL, leaves_of(SMALL))


@pytest.fixture
def exported(tmp_path, tensors):
    """A folder with an export of SMALL."""
    write_weights(tmp_path, tensors)
    return tmp_path


def split(path):
    """Header and payload of a file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, payload):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("seed", range(8))
def test_what_is_exported_comes_back_bit_for_bit(tmp_path, seed, dtype):
    config = random_config(seed)
    leaves = leaves_of(config, dtype, seed)
    write_weights(tmp_path, export_tensors(config, leaves))
    assert fitting_config(open_weights(tmp_path), config) == config
    assert_same(leaves, read(tmp_path, config, dtype))


def test_an_export_is_a_plain_safetensors_file(exported, tensors):
    loaded = load_file(exported / MODEL)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor)
    with safe_open(exported / MODEL, "numpy") as file:
        assert file.metadata()["format"] == "pt"
    assert [path.name for path in exported.iterdir()] == [MODEL]


def test_an_export_is_as_readable_as_other_files(exported):
    (exported / "other").touch()
    assert (exported / MODEL).stat().st_mode == (exported / "other").stat().st_mode


def test_the_names_and_layers_are_those_of_transformers():
    config = dataclasses.replace(SMALL, tied_head=False)
    leaves = leaves_of(config)
    tensors = export_tensors(config, leaves)
    assert tensors["transformer.wte.weight"].shape == (11, 4)
    assert "head" in leaves and "lm_head.weight" in tensors and "transformer.lm_head.weight" not in tensors
    for layer in range(2):
        kernel = tensors[f"transformer.h.{layer}.mlp.c_fc.weight"]
        np.testing.assert_array_equal(kernel, leaves["blocks/mlp/up/kernel"][layer])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_model_without_biases_is_written_with_zeros(norm):
    config = dataclasses.replace(SMALL, bias=False, norm=norm)
    tensors = export_tensors(config, leaves_of(config))
    with_biases = dataclasses.replace(config, bias=True)
    expected = export_tensors(with_biases, leaves_of(with_biases))
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in expected.items()}
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith(".bias"))


def test_leaves_of_another_model_are_not_exported():
    leaves = leaves_of(SMALL)
    for wrong in (
        leaves | {"head": leaves["token_embedding/embedding"]},
        {"final_norm/bias": leaves["final_norm/bias"]},
    ):
        with pytest.raises(ValueError, match=r"head|token_embedding"):
            export_tensors(SMALL, wrong)


@pytest.mark.parametrize("missing", [(), ("transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.bias")], ids=str)
def test_a_bias_that_somebody_trained_is_kept(tmp_path, missing):
    config = dataclasses.replace(SMALL, bias=False)
    tensors = export_tensors(config, leaves_of(config))
    save_file({name: tensor for name, tensor in tensors.items() if name not in missing}, tmp_path / MODEL)
    assert fitting_config(open_weights(tmp_path), config) == config
    assert_same(leaves_of(config), read(tmp_path, config))
    trained = tensors["transformer.h.1.attn.c_attn.bias"]
    trained[3] = -1e-30
    save_file(tensors, tmp_path / MODEL)
    fitting = fitting_config(open_weights(tmp_path), config)
    assert fitting == dataclasses.replace(config, bias=True)
    np.testing.assert_array_equal(read(tmp_path, fitting)["blocks/attention/qkv/bias"][1], trained)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_with_and_without_a_prefix(tmp_path, tensors, prefix):
    save_file({prefix + name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / MODEL)
    assert_same(leaves_of(SMALL), read(tmp_path))


def test_the_same_tensor_under_two_names_is_refused(tmp_path, tensors):
    save_file(tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"]}, tmp_path / MODEL)
    with pytest.raises(ValueError, match=r"model\.safetensors.*ln_f\.bias"):
        open_weights(tmp_path)


def test_buffers_and_other_heads_are_left_out(tmp_path, tensors):
    """What old versions saved beside the parameters, in the dtypes they did."""
    buffers = {f"transformer.h.{layer}.attn.bias": np.tri(5, dtype=bool)[None, None] for layer in range(2)}
    buffers["h.0.attn.bias"] = np.tri(5, dtype=np.uint8)[None, None]
    del buffers["transformer.h.0.attn.bias"]
    buffers |= {"transformer.h.0.attn.masked_bias": np.float32(-1e4), "position_ids": np.arange(5)[None]}
    heads = {name: np.ones((2, 4), np.float32) for name in ("score.weight", "classifier.weight")}
    heads["multiple_choice_head.summary.weight"] = np.ones((1, 4), np.float32)
    save_file(tensors | {name: np.asarray(tensor) for name, tensor in (buffers | heads).items()}, tmp_path / MODEL)
    assert_same(leaves_of(SMALL), read(tmp_path))


@pytest.mark.parametrize("name", ["transformer.h.2.ln_1.weight", "lm_head.bias", "transformer.h.0.crossattention.bias"])
def test_a_tensor_too_many_is_refused(tmp_path, tensors, name):
    save_file(tensors | {name: np.ones(4, np.float32)}, tmp_path / MODEL)
    with pytest.raises(ValueError, match=name.removeprefix("transformer.")):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.ln_f.bias", "transformer.h.1.mlp.c_proj.weight"]
)
def test_a_missing_tensor_is_named(tmp_path, tensors, name):
    del tensors[name]
    save_file(tensors, tmp_path / MODEL)
    with pytest.raises(ValueError, match=name.removeprefix("transformer.")):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("wte.weight", (12, 4)), ("h.1.attn.c_attn.weight", (12, 4)), ("ln_f.weight", (1, 4)), ("h.0.ln_1.bias", ())],
)
def test_wrong_shapes_are_named_before_anything_is_read(tmp_path, tensors, name, shape):
    tensors["transformer." + name] = np.zeros(shape, np.float32)
    save_file(tensors, tmp_path / MODEL)
    right = tuple(export_tensors(SMALL, leaves_of(SMALL))["transformer." + name].shape)
    placed = []
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
        read(tmp_path, place=placed.append)
    assert all(part in str(error.value) for part in (name, str(shape), str(right)))
    assert not placed


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_beside_the_embedding(tmp_path, tensors, tied):
    """Some files hold the tied head a second time; another head there must not be lost."""
    config = dataclasses.replace(SMALL, tied_head=tied)
    head = tensors["transformer.wte.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / MODEL)
    leaves = read(tmp_path, config)
    assert ("head" in leaves) is not tied
    head[-1, -1] += 1e-3
    save_file(tensors | {"lm_head.weight": head}, tmp_path / MODEL)
    if tied:
        with pytest.raises(ValueError, match=r"config\.json.*lm_head\.weight|lm_head\.weight.*config\.json"):
            read(tmp_path, config)
    else:
        np.testing.assert_array_equal(read(tmp_path, config)["head"], head)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64, np.float32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("wanted", [np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
def test_dtypes_are_cast_on_the_way(tmp_path, stored, wanted):
    leaves = leaves_of(SMALL, stored)
    write_weights(tmp_path, export_tensors(SMALL, leaves))
    assert_same({path: leaf.astype(wanted) for path, leaf in leaves.items()}, read(tmp_path, dtype=wanted))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.bool_], ids=lambda d: d.__name__)
def test_other_dtypes_are_refused(tmp_path, tensors, dtype):
    tensors["transformer.h.1.mlp.c_fc.weight"] = np.ones((4, 16), dtype)
    save_file(tensors, tmp_path / MODEL)
    with pytest.raises(ValueError, match=r"model\.safetensors.*h\.1\.mlp\.c_fc\.weight.*(I8|I32|BOOL)"):
        read(tmp_path)


def test_tensors_may_lie_at_any_byte(exported):
    header, payload = split(exported / MODEL)
    text = json.dumps(header).encode()
    write_raw(exported / MODEL, text + b" " * (-len(text) % 8 + 3), payload)
    assert_same(leaves_of(SMALL), read(exported))


def damaged(header, payload):
    """(what, header, payload) of files that are not what they should be."""
    text = json.dumps(header).encode()
    names = [name for name in header if name != "__metadata__"]
    first, second = (header[name]["data_offsets"] for name in names[:2])
    yield "cut in the payload", header, payload[:-1]
    yield "cut in the header", text[: len(text) // 2], b""
    yield "longer than it says", header, payload + b"\0"
    yield "not JSON", b"{" + text, payload
    yield "a list", b"[]", b""
    yield "overlapping", header | {names[1]: header[names[1]] | {"data_offsets": first}}, payload
    yield "an end before the start", header | {names[0]: header[names[0]] | {"data_offsets": first[::-1]}}, payload
    yield "too few bytes", header | {names[0]: header[names[0]] | {"data_offsets": [first[0], second[0] - 4]}}, payload
    yield "beyond the file", header | {names[0]: header[names[0]] | {"data_offsets": [2**61, 2**62]}}, payload
    yield "a negative offset", header | {names[0]: header[names[0]] | {"data_offsets": [-4, 0]}}, payload
    yield "a huge shape", header | {names[0]: header[names[0]] | {"shape": [2**40, 2**40]}}, payload
    yield "an unknown dtype", header | {names[0]: header[names[0]] | {"dtype": "F7"}}, payload


DAMAGES = [what for what, _, _ in damaged({"a": {"data_offsets": [0, 4]}, "b": {"data_offsets": [4, 8]}}, b"")]


@pytest.mark.parametrize("what", DAMAGES)
def test_a_header_that_lies_is_refused(exported, what):
    for name, header, payload in damaged(*split(exported / MODEL)):
        if name == what:
            write_raw(exported / MODEL, header, payload)
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        read(exported)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\1\2\3", struct.pack("<Q", 2**62) + b"{}", b"<!DOCTYPE html>" * 99])
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    (tmp_path / MODEL).write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_cut_file_is_refused(exported, share):
    data = (exported / MODEL).read_bytes()
    (exported / MODEL).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_weights(exported)


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.1.attn.c_proj.bias", "transformer.ln_f.weight"]
)
def test_a_flipped_bit_in_an_export_is_found(exported, name):
    header, payload = split(exported / MODEL)
    flipped = bytearray(payload)
    flipped[header[name]["data_offsets"][0] + 1] ^= 4
    write_raw(exported / MODEL, header, bytes(flipped))
    with pytest.raises(ValueError, match=rf"model\.safetensors.*damaged.*{name.removeprefix('transformer.')}"):
        read(exported)


@pytest.mark.parametrize("checksums", ["no", "[]", "null", "3"])
def test_checksums_that_are_none_are_refused(exported, checksums):
    header, payload = split(exported / MODEL)
    header["__metadata__"]["crc32"] = checksums
    write_raw(exported / MODEL, header, payload)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read(exported)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_files_from_elsewhere_have_no_checksums(exported, metadata):
    header, payload = split(exported / MODEL)
    write_raw(exported / MODEL, header | {"__metadata__": metadata}, payload)
    assert_same(leaves_of(SMALL), read(exported))


def shard(folder, tensors, weight_map=None):
    """The tensors in two files and their index, as transformers writes large models."""
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    right = {name: file for file, own in halves.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map or right}))
    return right


def test_sharded_files(tmp_path, tensors):
    shard(tmp_path, tensors)
    assert_same(leaves_of(SMALL), read(tmp_path))


def test_a_missing_shard_is_named(tmp_path, tensors):
    shard(tmp_path, tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "..", ".", "", "a/b", "a\\b", "c:x/y"]
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, tensors, name):
    inner = tmp_path / "model"
    inner.mkdir()
    save_file(tensors, tmp_path / MODEL)
    shard(inner, tensors, dict.fromkeys(tensors, name))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
        open_weights(inner)
    assert INDEX in str(error.value) and repr(name) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '"\\ud800'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "gpt.ckpt", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_never_read(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ValueError, match=f"{name}.*run any code.*save_pretrained"):
        open_weights(tmp_path)


def test_no_weights_at_all(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path.name}.*model\.safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize("intact", [True, False])
def test_a_file_in_the_hubs_cache_is_what_its_name_says(exported, intact):
    data = bytearray((exported / MODEL).read_bytes())
    blob = exported / hashlib.sha256(data).hexdigest()
    header, payload = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]), split(exported / MODEL)[1]
    del header["__metadata__"]
    (exported / MODEL).unlink()
    if intact:
        blob.write_bytes(data)
    else:
        write_raw(blob, header, payload)  # as readable as ever, but another file
    os.symlink(blob, exported / MODEL)
    if intact:
        assert_same(leaves_of(SMALL), read(exported))
    else:
        with pytest.raises(ValueError, match=r"model\.safetensors.*damaged.*delete.*load"):
            read(exported)


def test_a_link_that_is_named_otherwise_is_read(exported):
    (exported / MODEL).rename(exported / "elsewhere")
    os.symlink("elsewhere", exported / MODEL)
    assert_same(leaves_of(SMALL), read(exported))


def test_no_more_than_one_leaf_is_in_memory(tmp_path):
    config = GPTConfig(vocab_size=512, context=256, layers=8, heads=2, width=64)
    leaves = leaves_of(config)
    write_weights(tmp_path, export_tensors(config, leaves))
    total, largest = (function(leaf.nbytes for leaf in leaves.values()) for function in (sum, max))
    tracemalloc.start()
    read(tmp_path, config, place=lambda leaf: None)  # as a device would, that has memory of its own
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < largest + 300_000 < total / 2


def test_what_was_there_before_stays_when_writing_fails(exported, tensors, monkeypatch):
    before = (exported / MODEL).read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights(exported, tensors | {"more": np.ones(3, np.float32)})
    assert (exported / MODEL).read_bytes() == before
    assert [path.name for path in exported.iterdir()] == [MODEL]
