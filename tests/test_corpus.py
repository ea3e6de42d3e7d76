"""Corpora: documents as they stand in the files, and a held-out split that depends on nothing but the text."""

import io
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxgpt.config import DataConfig
from jaxgpt.data.corpus import DEFAULT_BYTES, Corpus, open_corpus, standard_library
from jaxgpt.data.split import split_corpus


def write(folder: Path, texts: dict[str, str | bytes]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def corpus(*paths: Path | str, text_field: str = "text") -> Corpus:
    return open_corpus(DataConfig(path=tuple(map(str, paths)), text_field=text_field))


def random_documents(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + "".join(rng.choices("abc é漢\n", k=rng.randrange(1, 200))) for i in range(count)]


def in_files(folder: Path, documents: list[str]) -> Corpus:
    return corpus(write(folder, {f"{i:04d}.txt": text for i, text in enumerate(documents)}))


def both_parts(documents: Corpus, share: float) -> tuple[list[str], list[str]]:
    split = split_corpus(documents, share)
    return list(split.part(documents, held_out=False)), list(split.part(documents, held_out=True))


def test_a_text_is_read_as_it_stands(tmp_path):
    text = "\ufeffone\r\ntwo\rthree\n\n  é😀\0\t"
    assert list(corpus(write(tmp_path, {"a.txt": text}) / "a.txt")) == [text]


def test_a_folder_is_read_in_order_without_what_is_hidden(tmp_path):
    write(tmp_path, {"b.txt": "2", "a/z.md": "1", "c": "3", "empty.txt": ""})
    write(tmp_path, {".hidden": "x", ".git/config": "x", "a/.git/deep/config": "x", "__pycache__/c.pyc": b"\xff"})
    documents = corpus(tmp_path)
    assert list(documents) == ["1", "2", "3"]
    assert list(documents) == ["1", "2", "3"]  # anew
    assert list(corpus(tmp_path / "c", tmp_path / "a")) == ["3", "1"]


def test_json_lines_are_documents(tmp_path):
    texts = random_documents(0, 20)
    lines = "\n\n".join(json.dumps({"id": 1, "body": text}) for text in texts)
    assert list(corpus(write(tmp_path, {"a.jsonl": lines}) / "a.jsonl", text_field="body")) == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x", "id": 1}', "line 2, has no field 'text'; it has 'body', 'id'"),
        (b'{"text": ', "line 2, is not JSON"),
        (b"[" * 100_000, "line 2, is not JSON"),
        (b"[1]", "line 2, is not a JSON object"),
        (b'{"text": 3}', "line 2: the field 'text' is not text"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8: byte 0xff at offset 10"),
        (rb'{"text": "\ud83d"}', "line 2: the field 'text' has half a character"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path, {"a.jsonl": b'{"text": "good"}\n' + line + b"\n"}) / "a.jsonl"
    with pytest.raises(ValueError, match=message) as raised:
        list(corpus(path))
    assert str(raised.value).startswith(str(path))


def test_a_mark_before_json_lines_is_no_text(tmp_path):
    path = write(tmp_path, {"a.jsonl": '\ufeff{"text": "one"}\n{"text": "\ufefftwo"}\n'}) / "a.jsonl"
    assert list(corpus(path)) == ["one", "\ufefftwo"]


def test_what_may_not_be_read_is_named(tmp_path):
    for name in ("a.txt", "folder/inner"):
        path = write(tmp_path, {"a.txt": "text", "folder/b.txt": "text", "folder/inner/c.txt": "text"}) / name
        path.chmod(0)
        try:
            if os.access(path, os.R_OK):
                pytest.skip("needs a user who may not read everything")
            with pytest.raises(PermissionError, match=path.name):
                list(corpus(tmp_path / name.split("/")[0]))
        finally:
            path.chmod(0o700)


def test_standard_input_is_read_once_and_kept(monkeypatch):
    text = "from\r\na pipe é"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    documents = corpus("-")
    assert list(documents) == list(documents) == [text]


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = write(tmp_path, {"a.txt": "é".encode() + b"ab\xffcd"}) / "a.txt"
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 0xff at offset 4"):
            list(corpus(place))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        corpus(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="folder has no file"):
        corpus(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")  # would be empty the second time it is read
    with pytest.raises(ValueError, match="pipe is no regular file"):
        corpus(tmp_path / "pipe")


def test_text_that_cannot_be_split_is_refused(tmp_path):
    write(tmp_path, {"empty.txt": "", "one.txt": "x", "1/a": "same", "1/b": "same"})
    with pytest.raises(ValueError, match=r"holds no text; this was read: .*empty\.txt"):
        split_corpus(corpus(tmp_path / "empty.txt"), 0.1)
    with pytest.raises(ValueError, match="1 characters, too short"):
        split_corpus(corpus(tmp_path / "one.txt"), 0.1)
    with pytest.raises(ValueError, match="2 copies of one document"):
        split_corpus(corpus(tmp_path / "1"), 0.1)


def test_the_end_of_a_single_text_is_held_out(tmp_path):
    rng = random.Random(1)
    for size in [2, 10, 100, *rng.sample(range(11, 20_000), 10)]:
        text = "".join(rng.choices("aé漢", k=size))
        train, held_out = both_parts(corpus(write(tmp_path, {"a": text}) / "a"), 0.1)
        assert train == [text[: int(size * 0.9)]]  # as nanoGPT does
        assert held_out == [text[int(size * 0.9) :]]


def test_whole_documents_are_held_out(tmp_path):
    documents = random_documents(2, 300)
    for share in (0.05, 0.1, 0.5):
        train, held_out = both_parts(in_files(tmp_path, documents), share)
        assert sorted(train + held_out) == sorted(documents)
        size = sum(len(text.encode()) for text in held_out)
        total = sum(len(text.encode()) for text in documents)
        largest = max(len(text.encode()) for text in documents)
        assert share * total <= size < share * total + largest


def test_a_document_that_is_most_of_the_text_is_trained_on(tmp_path):
    for seed in range(8):  # whichever digest comes first
        documents = [f"{seed} " + "long " * 1000, *random_documents(seed, 3)]
        train, held_out = both_parts(in_files(tmp_path / str(seed), documents), 0.3)
        assert documents[0] in train
        assert held_out


def test_some_document_is_on_either_side_whatever_the_share(tmp_path):
    for count, share in [(2, 0.001), (2, 0.999), (5, 0.001), (5, 0.999)]:
        train, held_out = both_parts(in_files(tmp_path / str(count), random_documents(3, count)), share)
        assert train
        assert held_out


def test_the_split_does_not_depend_on_names_or_order(tmp_path):
    documents = random_documents(4, 40)
    shuffled = random.Random(5).sample(documents, len(documents))
    lines = write(tmp_path, {"b.jsonl": "\n".join(json.dumps({"text": text}) for text in documents)}) / "b.jsonl"
    train, held_out = both_parts(in_files(tmp_path / "a", documents), 0.2)
    for other in (in_files(tmp_path / "c", shuffled), corpus(lines)):
        other_train, other_held_out = both_parts(other, 0.2)
        assert (set(other_train), set(other_held_out)) == (set(train), set(held_out))


def test_copies_of_a_document_stay_together(tmp_path):
    documents = random_documents(6, 10) * 3
    train, held_out = both_parts(in_files(tmp_path, documents), 0.3)
    assert len(train) + len(held_out) == len(documents)
    assert not set(train) & set(held_out)


def test_the_fingerprint_is_of_the_text_and_not_of_its_place(tmp_path):
    documents = random_documents(7, 5)
    fingerprint = split_corpus(in_files(tmp_path / "a", documents), 0.1).fingerprint
    assert split_corpus(in_files(tmp_path / "b", documents), 0.1).fingerprint == fingerprint
    for changed in ([*documents[:-1], documents[-1] + " "], documents[:-1], documents[::-1]):
        folder = tmp_path / str(hash(tuple(changed)))
        assert split_corpus(in_files(folder, changed), 0.1).fingerprint != fingerprint


def test_the_default_is_source_of_this_python():
    documents = standard_library()
    texts = list(documents)
    assert DEFAULT_BYTES * 0.5 < sum(len(text.encode()) for text in texts) <= DEFAULT_BYTES
    for text in texts[:: len(texts) // 20]:
        compile(text, "a module", "exec", dont_inherit=True)
    parts = {part for path in documents.files if path is not None for part in path.parts[-3:]}
    assert not parts & {"site-packages", "test", "tests", "encodings", "__pycache__"}
    assert documents.files == tuple(sorted(path for path in documents.files if path is not None))
    assert open_corpus(DataConfig()) == documents
