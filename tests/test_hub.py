"""Names on the hub: found in a cache laid out as the hub's, without a network; what is not there is said."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt import api
from jaxgpt.storage.hub import find_model
from jaxgpt.storage.weights import open_weights

ROOT = Path(__file__).parents[1]
COMMIT, OTHER = "0" * 39 + "1", "0" * 39 + "2"


def lay_out(cache, name, files, commit=COMMIT, branch="main"):
    """A snapshot as the hub's cache has it: blobs named by their digest, links to them, a reference."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for path in (folder / "blobs", folder / "refs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / branch).write_text(commit)
    for file, data in files.items():
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / file).symlink_to(blob)
    return snapshot


def find(cache, name, revision=None):
    """In a process of its own: the library reads these variables when it is imported."""
    program = (
        "import sys, json\nfrom jaxgpt.storage.hub import find_model\n"
        "try: print(json.dumps(str(find_model(*json.loads(sys.argv[1])))))\n"
        "except Exception as error: print(json.dumps([type(error).__name__, str(error)]))"
    )
    variables = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, json.dumps([name, revision])]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True, cwd=cache)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_cached_model_is_found_without_a_network(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"x"}
    main = lay_out(tmp_path, "openai-community/gpt2", files)
    branch = lay_out(tmp_path, "openai-community/gpt2", {"config.json": b"[]"}, OTHER, "tuned")
    assert find(tmp_path, "openai-community/gpt2") == str(main)
    assert find(tmp_path, "gpt2") == str(main), "the same model by its short name"
    assert find(tmp_path, "gpt2", "tuned") == find(tmp_path, "gpt2", OTHER) == str(branch)
    own = lay_out(tmp_path, "someone/tuned", files)
    assert find(tmp_path, "someone/tuned") == str(own)


def test_what_is_neither_here_nor_cached_is_said(tmp_path):
    kind, message = find(tmp_path, "someone/absent")
    assert kind == "FileNotFoundError"
    assert "no folder someone/absent" in message and "HF_HUB_OFFLINE" in message and "\n" not in message
    assert "someone/absent at v2" in find(tmp_path, "someone/absent", "v2")[1]


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "../x", "~/x", "", "x/../y", "/nowhere/at/all"])
def test_what_is_no_name_is_not_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            find_model(name)
    else:
        assert find_model(".") == Path()


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert find_model("gpt2") == Path("gpt2")
    with pytest.raises(NotADirectoryError, match="file is a file; a model is a folder"):
        find_model("file")


def test_a_damaged_blob_is_seen(tmp_path):
    """Published files carry no checksums, but the cache names them by their digest."""
    from test_api import model_with

    api.export(model_with(), tmp_path / "export")
    whole = (tmp_path / "export" / "model.safetensors").read_bytes()
    snapshot = lay_out(tmp_path, "a/b", {"model.safetensors": whole})
    assert open_weights(snapshot)
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="not what its digest says; delete"):
        open_weights(snapshot)
