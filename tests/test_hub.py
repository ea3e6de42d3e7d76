"""Names on the Hugging Face hub, from a cache on this machine. No host is contacted: a server here plays the hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from jaxgpt.storage.hub import find_model
from jaxgpt.storage.weights import open_weights

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
SCRIPT = """
import json, sys
from jaxgpt.storage.hub import find_model
for arguments in json.load(sys.stdin):
    try:
        print(json.dumps(["found", str(find_model(*arguments))]))
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        print(json.dumps([kinds, str(error)]))
"""


def add_to_cache(cache, name, files, commit=COMMIT):
    """Lay files out as the hub's library does: blobs by digest, and links to them in the snapshot of a commit."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = folder / "snapshots" / commit, folder / "blobs"
    for path in (snapshot, blobs, folder / "refs"):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for file, data in files.items():
        digest = hashlib.sha256(data) if file.endswith(".safetensors") else hashlib.sha1(data)
        (blobs / digest.hexdigest()).write_bytes(data)
        (snapshot / file).symlink_to(Path("../../blobs") / digest.hexdigest())
    return snapshot


WHOLE = {"config.json": b"{}", "model.safetensors": save({"a": np.arange(3, dtype=np.float32)})}


def find(cache, *arguments, **environment):
    """What `find_model` says to each of `arguments`, in a process with this cache: the library reads it at import."""
    inherited = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    variables = inherited | {"HF_HUB_CACHE": str(cache), "HF_HOME": str(cache / "home"), "HF_HUB_OFFLINE": "1"}
    variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"} | environment
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[1], env=variables, text=True, capture_output=True,
        input=json.dumps(arguments), timeout=20,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@contextmanager
def hub(answers):
    """The address of a server on this machine that answers by the name asked for: (status, the hub's error code)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, code = next((answer for name, answer in answers.items() if f"/{name}/" in self.path), (500, ""))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert find_model("gpt2") == Path("gpt2")  # the hub is not asked


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotADirectoryError, match=r"model\.safetensors.*folder"):
        find_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["./gpt2", "/no/such", "a/b/c", "", "-x", "gpt 2", "a..b", ".gpt2", "gpt2\n", "\0"])
def test_what_is_no_name_is_refused_without_asking(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_model(name)


@pytest.mark.parametrize("revision", ["../../x", "v/../../x", "", "-x", "a b", "/etc"])
def test_what_is_no_revision_is_refused_without_asking(revision):
    with pytest.raises(ValueError, match="commit, tag or branch"):
        find_model("gpt2", revision)


def test_what_is_in_the_cache_is_found_offline(tmp_path):
    """Under the name it was downloaded by, and under its other one; at no other commit."""
    gpt2 = add_to_cache(tmp_path, "openai-community/gpt2", WHOLE)
    distil = add_to_cache(tmp_path, "distilgpt2", WHOLE)
    own = add_to_cache(tmp_path, "someone/gpt2-tuned", WHOLE)
    asked = {
        ("openai-community/gpt2",): gpt2, ("gpt2",): gpt2, ("gpt2", "main"): gpt2, ("gpt2", COMMIT): gpt2,
        ("distilgpt2",): distil, ("distilbert/distilgpt2",): distil, ("someone/gpt2-tuned",): own,
    }  # fmt: skip
    for (arguments, folder), found in zip(asked.items(), find(tmp_path, *asked), strict=True):
        assert found == ["found", str(folder)], arguments
    missing = [("gpt2-tuned",), ("gpt2-medium",), ("gpt2", "f" * 40), ("gpt2", "v2"), ("someone/gpt2",)]
    for arguments, (kinds, message) in zip(missing, find(tmp_path, *missing), strict=True):
        assert "FileNotFoundError" in kinds, (arguments, message)
        assert "there is no folder" in message and "\n" not in message
        assert all(argument in message for argument in arguments) and "HF_HUB_OFFLINE" in message


def test_each_of_two_names_is_found_by_the_other(tmp_path):
    names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-gpt")
    pairs = [(name, f"openai-community/{name}") for name in names] + [("distilgpt2", "distilbert/distilgpt2")]
    for old, new in pairs:
        add_to_cache(tmp_path / "old", old, WHOLE)
        add_to_cache(tmp_path / "new", new, WHOLE)
    assert all(found == "found" for found, _ in find(tmp_path / "old", *[(new,) for _, new in pairs]))
    assert all(found == "found" for found, _ in find(tmp_path / "new", *[(old,) for old, _ in pairs]))


def test_a_hub_that_cannot_be_reached(tmp_path):
    """Nobody listens on that port. The library would ask half a minute long for a commit; the cache has it."""
    whole = add_to_cache(tmp_path, "openai-community/gpt2", WHOLE)
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    *found, (kinds, message) = find(tmp_path, ("gpt2",), ("gpt2", COMMIT), ("someone/else",), **unreachable)
    assert found == [["found", str(whole)]] * 2
    assert "FileNotFoundError" in kinds
    assert "there is no folder someone/else" in message and "reached" in message and "\n" not in message


def test_a_broken_proxy_is_a_hub_that_cannot_be_reached(tmp_path):
    broken = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "https://hub.invalid", "NO_PROXY": ""}
    with hub({}) as address:  # it knows no CONNECT, so nothing gets through
        ((kinds, message),) = find(tmp_path, ("someone/else",), **broken, HTTPS_PROXY=address)
    assert "FileNotFoundError" in kinds and "someone/else" in message and "reached" in message


def test_what_the_hub_answers(tmp_path):
    nothing = ["there is no folder", "no model"]
    cases = [
        ("a/missing", (404, "RepoNotFound"), "FileNotFoundError", nothing),
        ("a/private", (401, "RepoNotFound"), "FileNotFoundError", nothing),
        ("a/unrevised", (404, "RevisionNotFound"), "FileNotFoundError", ["no revision v2"]),
        ("a/gated", (403, "GatedRepo"), "FileNotFoundError", ["log in"]),
        ("a/broken", (500, ""), "FileNotFoundError", ["there is no folder", "reached"]),
    ]
    with hub({name: answer for name, answer, _, _ in cases}) as address:
        asked = [(name, "v2") for name, _, _, _ in cases]
        results = find(tmp_path, *asked, HF_HUB_OFFLINE="0", HF_ENDPOINT=address)
    for (name, _, kind, words), (kinds, message) in zip(cases, results, strict=True):
        assert kind in kinds, (name, message)
        assert all(word in message for word in [name, *words]), message
        assert "\n" not in message


def test_a_damaged_file_in_the_cache_is_refused(tmp_path):
    snapshot = add_to_cache(tmp_path, "gpt2", WHOLE)
    assert find(tmp_path, ("gpt2",)) == [["found", str(snapshot)]]
    np.testing.assert_array_equal(open_weights(snapshot)["a"].read(), np.arange(3))
    blob = (snapshot / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*damaged.*{blob.name}"):
        open_weights(snapshot)["a"].read()
