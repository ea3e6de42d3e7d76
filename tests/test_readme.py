"""The README's commands and snippets work as pasted (shortened here: a few steps instead of thousands)."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from program import ROOT, environment, write_text
from test_api import model_with

from jaxgpt import api
from jaxgpt.data.phrases import phrases
from jaxgpt.data.reviews import reviews

NOTHING = subprocess.DEVNULL  # what would be typed

PAIRS = "--model.encoder-layers 1 --model.decoder-layers 2 --model.width 16 --data.vocab-size 300 --data.buckets 1 "
PAIRS += "--validation-sentences 4 --samples 1"
# By a word of the command; the first that is in it counts.
SMALL = {
    "--resume": "--sample-tokens 8",
    "translate": PAIRS,
    "multi30k": PAIRS,
    "chat --init-from": "--validation-answers 2 --samples 1",
    "train.py chat": "--model.layers 2 --model.width 16 --data.vocab-size 300 --validation-answers 2 --samples 1",
    "finetune": "--samples 1",
    "sentiment": "--model.layers 2 --model.width 16 --data.vocab-size 300 --samples 1",
    "--init-from": "--sample-tokens 8",
    "shakespeare": "--model.layers 2 --model.width 24 --sample-tokens 8",
    "": "--model.width 24 --sample-tokens 8",
}
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    """Code blocks from the tour on; what is before it installs packages, which CI does with the same lines."""
    return re.findall(rf"```{language}\n(.*?)```", README[README.index("## Tour") :], re.DOTALL)


def shortened(line):
    """The same command with this interpreter, and small where it would take minutes."""
    line = re.sub("^jaxgpt ", f"{sys.executable} -m jaxgpt ", line)
    line = re.sub(r"\bpython (train|benchmarks)", rf"{sys.executable} \1", line)
    line = re.sub("^XLA_FLAGS=", 'XLA_FLAGS="$XLA_FLAGS "', line)
    if "train.py" in line:
        steps = 5 if "--resume" in line else 3
        small = next(flags for word, flags in SMALL.items() if word in line)
        line = re.sub(r"--steps \d+", "", line) + f" --steps {steps} {small}"
    if "jaxgpt plan" in line:
        line += " --model.layers 2 --model.width 256 --model.heads 4 --model.vocab-size 512 --model.context 64"
    if "benchmarks/train_step" in line:
        line += " --steps 2"
    return line


def stand_in_for_gpt2(hub):
    """A small random model where the hub's cache would have gpt2: no network here."""
    folder = hub / "models--gpt2"
    api.export(model_with(context=64), folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)


def write_pairs(folder):
    """Parallel text under the names the tour gives it."""
    pairs = phrases()[0]
    for number, name in enumerate(("train", "val", "test")):
        part = pairs[number * 40 : number * 40 + 40]
        for side, language in enumerate(("en", "de")):
            (folder / f"{name}.{language}").write_text("".join(f"{pair[side]}\n" for pair in part), "utf-8")


def write_examples(folder):
    """Reviews to read, labelled ones, and chats, under the names the tour gives them."""
    train, dev = reviews()
    for name, part in (("train", train[:60]), ("dev", dev[:20])):
        (folder / f"{name}.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in part), "utf-8")
    (folder / "reviews.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text, _ in train[:900]), "utf-8"
    )
    chats = [{"prompt": f"say {number}", "response": str(number)} for number in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")


def test_the_tour_works_as_pasted(tmp_path):
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    for name in ("benchmarks", "jaxgpt", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = write_text(tmp_path, 20_000).rename(tmp_path / "input.txt")
    text.write_text("ROMEO:\n" + text.read_text())  # whom the tour lets speak
    stand_in_for_gpt2(tmp_path / "hub")
    write_pairs(tmp_path)
    write_examples(tmp_path)
    cache = environment(tmp_path / "cache") | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "hub")}
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        if line.startswith(("curl", "pip")) or "--vs" in line:
            continue  # no network here; the comparison has a test of its own
        # libtpu, which plan loads, does not know all of the others' flags.
        env = cache | ({"XLA_FLAGS": ""} if " plan " in line else {})
        done = subprocess.run(
            ["bash", "-c", shortened(line)], cwd=tmp_path, env=env, capture_output=True, text=True, stdin=NOTHING
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for snippet in blocks("python"):
        done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=cache, capture_output=True, text=True)
        assert done.returncode == 0, f"{snippet}\n{done.stderr}"
        assert done.stdout.strip()


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
