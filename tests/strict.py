"""The same bits on any number of devices, by the real command line: `python tests/strict.py [--steps 30]`.

A GPT and an encoder-decoder, dropout on, with `--strict-reproducibility` on 1, 2, 4 and 8 virtual devices, and on 8,
then 2, then 1, resumed at a third and at two thirds. Prints a digest of parameters and optimiser state, and one of all
that was logged but times; they must be the same in all runs of a model, or the exit code is 1. Most of the time goes
into compiling: each of 8 devices has its own copy of every program.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from program import run, write_text

# Without a schedule a run of fewer steps is the beginning of one of more.
COMMON = (
    "--strict-reproducibility --optimizer.schedule constant --optimizer.warmup-steps 0 --log-interval 1 --quiet "
    "--model.dropout 0.2"
)
MODELS = {
    "GPT": "shakespeare-char-cpu --data.path {text} --data.batch-size 16 --sample-tokens 0",
    "encoder-decoder": "translate --data.buckets 1 --validation-sentences 20 --samples 0",
}
PLANS = ((8, 2, 1), (8,), (4,), (2,), (1,))


def train(arguments: str, plan: Sequence[int], steps: int, out: Path, cache: Path) -> None:
    """Train to `steps` on as many devices as `plan` says, one after another, each for its share of the steps."""
    for part, devices in enumerate(plan, 1):
        budget = f"--steps {steps * part // len(plan)} --eval-interval {steps // 6}"  # so that no part ends between two
        begin = f"{arguments} {COMMON}" if part == 1 else "--resume --quiet"
        run(f"{begin} {budget} --out {out}", cache, devices, optimised=True)


def digest(out: Path, step: int) -> tuple[str, str]:
    """SHA-256 of every array of the checkpoint of `step`, and of all that was logged but times."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")  # it lies as it was saved, on one device
        trees = ocp.load_checkpointables(out / "checkpoints" / str(step))
    state = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path({k: trees[k] for k in ("parameters", "optimizer")}):
        array = np.asarray(leaf)
        state.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    timeless = [{k: v for k, v in r.items() if k != "seconds" and "per_second" not in k} for r in records]
    return state.hexdigest(), hashlib.sha256(json.dumps(timeless).encode()).hexdigest()


def main(arguments: Sequence[str]) -> int:
    """Print the table; return the exit code."""
    steps = int(arguments[1]) if arguments[:1] == ["--steps"] else 30
    same = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = write_text(folder, 100_000)
        for model, spelled in MODELS.items():
            digests = set()
            for plan in PLANS:
                out = folder / f"{model}-{'-'.join(map(str, plan))}"
                # The run on one device compiles its own programs.
                cache = folder / f"cache-{model}-{'alone' if plan == (1,) else 'shared'}"
                train(spelled.format(text=text), plan, steps, out, cache)
                state, logged = digest(out, steps)
                digests.add((state, logged))
                print(f"{model:<16}{' -> '.join(map(str, plan)):<12}{state[:16]}  {logged[:16]}", flush=True)
            same &= len(digests) == 1
    print("all the same" if same else "NOT the same")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
