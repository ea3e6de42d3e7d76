"""The whole suite: `python benchmarks/run.py [--form short|whole] [--out FOLDER] [--data TEXT] [--vs ...]`.

Each benchmark runs as its own command says, one after another. FOLDER gets the JSON of each, a chart of each, and
`environment.json`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
from measure import environment

from jaxgpt.arguments import parse
from jaxgpt.config import require, suggestion

HERE = Path(__file__).parent
NOT_DRAWN = ("saving", "plan_memory")  # nobody to compare with


@dataclass(frozen=True)
class Options:
    """Run the suite."""

    form: Literal["short", "whole"] = "short"
    """short: small shapes and few rounds, some minutes; whole: those of RESULTS.md, an hour or more"""
    out: str = "benchmark-results"
    """folder for JSON and charts"""
    data: str | None = None
    """a text, such as tinyshakespeare.txt, for what trains to the end (default: that is left out)"""
    only: tuple[str, ...] = ()
    """names of benchmarks (default: all)"""
    peers: bool = True
    """measure the peers that are installed as well"""


def commands(options: Options) -> dict[str, list[str]]:
    """Name -> script and arguments."""
    found = {name: importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "ctranslate2")}
    torch = options.peers and found["torch"] and found["transformers"]
    both, one = (["--vs", "torch", "plain"], ["--vs", "torch"]) if torch else ([], [])
    decoders = ["--vs", "hf", *(["ctranslate2"] if found["ctranslate2"] else [])] if torch else []
    large = ["train_step.py", "gpt2", "--batch-size", "1", "--sequence-length", "1024", "--compute-dtype", "float32"]
    if options.form == "short":
        suite = {
            "train_step": ["train_step.py", "shakespeare-char-cpu", "--rounds", "3", "--parts", *both],
            "attention": ["attention.py", "--lengths", "128", "256", "512", "1024", "--rounds", "3", *one],
            "generate": ["generate.py", "--size", "tiny", "--prompt-tokens", "32", "--new-tokens", "32", *decoders],
            "translate": ["translate.py", "--batch-size", "64", "--sentences", "16", "--rounds", "3", *one],
            "finetune": ["finetune.py", "--size", "tiny", "--rounds", "3", *one],
            "scaling": ["scaling.py", "--devices", "1", "2", "4", "--rounds", "3"],
            "saving": ["saving.py", "shakespeare-char-cpu"],
            "plan_memory": ["plan_memory.py", "--recipes", "shakespeare-char-cpu"],
        }
    else:
        suite = {
            "train_step": ["train_step.py", "shakespeare-char-cpu", "--rounds", "7", "--parts", *both],
            "train_step_124M": [*large, "--steps", "2", "--rounds", "5", "--parts", *both],
            "attention": ["attention.py", "--rounds", "5", *one],
            "generate": ["generate.py", "--rounds", "7", *decoders],
            "translate": ["translate.py", "--rounds", "7", *one],
            "finetune": ["finetune.py", *one],
            "scaling": ["scaling.py"],
            "saving": ["saving.py", *large[1:-2]],
            "plan_memory": ["plan_memory.py"],
        }
    if options.data is not None:
        text, short = ["--data", options.data], options.form == "short"
        steps, seeds = ("100", ["1"]) if short else ("500", ["1", "2", "3"])
        suite["compare_runs"] = ["compare.py", "runs", *text, "--steps", steps, *both]
        suite["compare_start"] = ["compare.py", "start", *text, "--rounds", "1" if short else "3"]
        suite["compare_quality"] = [
            "compare.py",
            "quality",
            *text,
            "--seeds",
            *seeds,
            *(["--vs", "plain"] if torch else []),
        ]
    for name in options.only:
        require(name in suite, f"there is no benchmark {name}{suggestion(name, suite)}")
    return {name: [*words, "--json"] for name, words in suite.items() if not options.only or name in options.only}


def run(name: str, command: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """Run one, show its table, keep its JSON; None if it failed, which ends nothing else."""
    print(f"\n== {name}: python benchmarks/{' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], capture_output=True, text=True)
    if done.returncode:
        print(f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
        return None
    *table, last = done.stdout.splitlines()
    print("\n".join(table), flush=True)
    result: dict[str, Any] = json.loads(last)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result


def groups(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Rows by contestant, for each thing that was measured."""
    if result["benchmark"] == "attention":
        return {f"T = {one['length']:,}": one["results"] for one in result["results"]}
    if result["benchmark"] == "generate":
        return {f"batch {one['batch']}": one["results"] for one in result["batches"]}
    if result["benchmark"] == "translate":
        trained = {"training": result["training"]["results"]} if "training" in result else {}
        return trained | {f"beam {one['beams']}": one["results"] for one in result.get("decoding", ())}
    return {"": result["results"]}


def draw(name: str, result: Mapping[str, Any], path: Path) -> None:
    """Bars of what everyone does in a second (or takes, in seconds), with the least and the greatest of the rounds."""
    from matplotlib.figure import Figure

    parts = groups(result)
    figure = Figure(figsize=(max(4.0, 3.2 * len(parts)), 3.2), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        unit = next(key for key in next(iter(rows.values())) if key.endswith("per_second") or key == "seconds")
        spreads = [row[unit] if isinstance(row[unit], dict) else dict.fromkeys(("median", "min", "max"), row[unit])
                   for row in rows.values()]  # fmt: skip
        heights = [spread["median"] for spread in spreads]
        below = [spread["median"] - spread["min"] for spread in spreads]
        above = [spread["max"] - spread["median"] for spread in spreads]
        axes.bar(list(rows), heights, yerr=(below, above), capsize=3, color=["C0", *["C7"] * (len(rows) - 1)])
        axes.set_title(title or name)
        axes.set_ylabel(unit.replace("_", " "))
        axes.tick_params(axis="x", rotation=30)
    figure.suptitle(f"{name}: {result['environment']['processor']}, {result['environment']['date']}", fontsize=9)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> int:
    """Run the suite; return the exit code: 1 if a benchmark failed."""
    try:
        options = parse(Options, list(arguments), "run.py")
        suite = commands(options)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"options": asdict(options), "commands": suite} | environment()
    (folder / "environment.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    failed = []
    for name, command in suite.items():
        result = run(name, command, folder)
        if result is None:
            failed.append(name)
        elif name not in NOT_DRAWN:
            draw(name, result, folder / f"{name}.png")
    print(f"\n{len(suite) - len(failed)} of {len(suite)} measured; JSON and charts lie in {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
