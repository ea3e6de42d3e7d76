"""Parts of a corpus: however it is cut, its documents are all there, once, in their order."""

import json
import random

import pytest

from jaxgpt.data.corpus import Corpus
from jaxgpt.data.parts import cut_corpus


def write_corpus(folder, seed):
    """Files of all kinds: texts, empty ones, JSON lines with blank lines, without a last newline, with a mark."""
    rng, files = random.Random(seed), []
    for number in range(rng.randrange(1, 6)):
        texts = ["".join(rng.choices("ab é漢\n", k=rng.randrange(0, 60))) for _ in range(rng.randrange(1, 9))]
        if rng.random() < 0.5:
            path = folder / f"{number}.txt"
            path.write_bytes(texts[0].encode())
        else:
            path = folder / f"{number}.jsonl"
            lines = [json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5) for text in texts]
            lines = [line for own in lines for line in (own, *[" "] * (rng.random() < 0.2))]
            whole = rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n"])
            path.write_bytes((rng.choice(["", "\ufeff"]) + whole).encode())
        files.append(path)
    return files


@pytest.mark.parametrize("seed", range(8))
def test_the_documents_are_those_of_the_corpus_in_their_order(tmp_path, seed):
    files = write_corpus(tmp_path, seed)
    expected = list(Corpus(tuple(files)))
    total = sum(path.stat().st_size for path in files)
    for size in {1, 2, 3, 7, 20, 100, total, 10**9}:
        parts = cut_corpus(files, "text", size)
        assert [text for part in parts for text in part] == expected
        assert sum(part.bytes for part in parts) == total
        assert size > 1 or len(parts) >= total / max(path.stat().st_size for path in files)


def test_a_line_that_is_wrong_is_named_by_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * 30})] * 4
    lines[2] = "{" + lines[2]
    path.write_text("\n".join(lines))
    place = path.read_text().index("{{")
    *_, part = [part for part in cut_corpus([path], "text", 40) if part.pieces[0].start <= place]
    with pytest.raises(ValueError, match=rf"a\.jsonl, the line at byte {place}, is not JSON"):
        list(part)
