"""The README's commands and snippets work as pasted (shortened here: a few steps instead of thousands)."""

from __future__ import annotations

import re
import subprocess
import sys

from program import ROOT, environment, write_text
from test_api import model_with

from jaxgpt import api
from jaxgpt.data.phrases import phrases

# By whether the run is resumed, and whether it translates.
SMALL = {
    (False, False): "--model.width 24 --sample-tokens 8",
    (True, False): "--sample-tokens 8",
    (False, True): "--model.width 16 --data.vocab-size 300 --data.buckets 2 --validation-sentences 8 --samples 1",
}
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    """Code blocks from the tour on; what is before it installs packages, which CI does with the same lines."""
    return re.findall(rf"```{language}\n(.*?)```", README[README.index("## Tour") :], re.DOTALL)


def shortened(line):
    """The same command with this interpreter, and small where it would take minutes."""
    line = re.sub("^jaxgpt ", f"{sys.executable} -m jaxgpt ", line)
    line = re.sub(r"\bpython (train|benchmarks)", rf"{sys.executable} \1", line)
    if "train.py" in line:
        steps = 5 if "--resume" in line else 3
        line = re.sub(r"--steps \d+", "", line) + f" --steps {steps} {SMALL['--resume' in line, of_pairs(line)]}"
    if "benchmarks/train_step" in line:
        line += " --steps 2"
    if "benchmarks/generate" in line:
        line += " --size tiny --vocab-size 300 --batch 1 --prompt-tokens 4 --new-tokens 4 --rounds 1"
    if "benchmarks/translate" in line:
        line += " --vocab-size 300 --batch-size 8 --steps 1 --sentences 2 --new-tokens 4 --rounds 1"
    return line


def of_pairs(line):
    return any(recipe in line for recipe in ("train.py translate", "multi30k"))


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


def test_the_tour_works_as_pasted(tmp_path):
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    for name in ("benchmarks", "jaxgpt", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = write_text(tmp_path, 20_000).rename(tmp_path / "input.txt")
    text.write_text("ROMEO:\n" + text.read_text())  # whom the tour lets speak
    stand_in_for_gpt2(tmp_path / "hub")
    write_pairs(tmp_path)
    cache = environment(tmp_path / "cache") | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "hub")}
    cache |= {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
    }  # what is tested is the commands: most of their time is compilation
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        if line.startswith(("curl", "pip")) or "--vs" in line:
            continue  # no network here; the comparison has a test of its own
        done = subprocess.run(["bash", "-c", shortened(line)], cwd=tmp_path, env=cache, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for snippet in blocks("python"):
        done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=cache, capture_output=True, text=True)
        assert done.returncode == 0, f"{snippet}\n{done.stderr}"
        assert done.stdout.strip()


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
