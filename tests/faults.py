"""A fault campaign on the real command line: `python tests/faults.py --trials 100 [--seed 0] [--kinds NAME ...]`.

Every trial does harm to a small run: to the process, or to the newest checkpoint of a copy of one that was broken off.
Then it is resumed. It must end with the bits of the unbroken run (parameters, optimiser state, every loss and gradient
norm), or refuse a damaged checkpoint by its name and end with these bits with --resume latest-good.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from program import ROOT, SMALL, environment, free_port, metrics, write_text

# isort: split
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from jaxgpt.models.gpt import init_parameters
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.storage.runs import RunFolder
from jaxgpt.training.optimizer import make_optimizer

STEPS, INTERVAL, BROKEN_OFF = 40, 4, 32
SETTINGS = (
    f"{SMALL} --model.dropout 0.2 --data.batch-size 8 --sample-tokens 0 --log-interval 1 --steps {STEPS} "
    f"--checkpoint-interval {INTERVAL} --eval-interval 20 --optimizer.skip-spikes 6 --quiet"
)
PATIENCE = 300  # seconds that a process may take, on a busy machine
OUTCOMES = ("refused", "resumed", "lost", "wrong", "too late")


@dataclass
class Campaign:
    """The folders of a campaign, what an unbroken run ends with, and how long one takes."""

    folder: Path
    random: random.Random
    seconds: float = 0.0
    expected: tuple[object, ...] = ()

    @property
    def broken(self) -> Path:
        """A run that was killed once step `BROKEN_OFF` was saved."""
        return self.folder / "broken"

    def prepare(self) -> None:
        """Make the runs that every trial starts from or is compared with."""
        text = write_text(self.folder, 3000)
        self.settings = f"{SETTINGS} --data.path {text}"
        self.run(f"{self.settings} --out {self.folder / 'first'}")  # compiles everything
        start = time.monotonic()
        self.run(f"{self.settings} --out {self.folder / 'unbroken'}")
        self.seconds = time.monotonic() - start
        self.expected = self.ending(self.folder / "unbroken")
        assert self.ending(self.folder / "first") == self.expected, "the program itself is not the same twice"
        process = self.start(f"{self.settings} --steps 100000 --out {self.broken}")
        while not (self.broken / "checkpoints" / str(BROKEN_OFF)).exists():
            assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        shutil.rmtree(self.folder / "first")

    def start(self, arguments: str, largest_file: int | None = None) -> subprocess.Popen[str]:
        """Start `python train.py ARGUMENTS`, which may write files of so many blocks of 512 bytes."""
        limited = [] if largest_file is None else ["sh", "-c", 'ulimit -f "$0" && exec "$@"', str(largest_file)]
        programs = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs")}
        programs |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            [*limited, sys.executable, str(ROOT / "train.py"), *arguments.split()],
            cwd=self.folder,
            env=environment(self.folder / "cache") | {"PYTHONPATH": str(ROOT)} | programs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_two(self, arguments: str) -> list[subprocess.Popen[str]]:
        """Start a run of two processes."""
        hosts = f"--hosts.coordinator 127.0.0.1:{free_port()} --hosts.heartbeat 5 --hosts.timeout 60"
        return [self.start(f"{arguments} {hosts} --hosts.processes 2 --hosts.process {number}") for number in range(2)]

    @functools.cached_property
    def expected_of_two(self) -> tuple[object, ...]:
        """What an unbroken run of two processes ends with."""
        ends = [self.end(process) for process in self.start_two(f"{self.settings} --out {self.folder / 'two'}")]
        assert [code for code, _ in ends] == [0, 0], ends
        return self.ending(self.folder / "two")

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait for the end; return exit code and what was printed to standard error."""
        _, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, errors

    def run(self, arguments: str) -> tuple[int, str]:
        """Run to the end; return exit code and what was printed to standard error."""
        return self.end(self.start(arguments))

    def ending(self, run: Path) -> tuple[object, ...]:
        """The last checkpoint's bytes, and every logged loss and gradient norm."""
        config = RunFolder.at(run).saved_config()
        parameters = jax.eval_shape(lambda: init_parameters(config.model, jax.random.key(0)))
        optimizer = jax.eval_shape(make_optimizer(config.optimizer, config.steps).init, parameters)
        shapes = {"parameters": parameters, "optimizer": optimizer}
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with contextlib.closing(Checkpoints(run / "checkpoints", read_only=True)) as checkpoints:
            trees, _ = checkpoints.restore(STEPS, shapes, device)
        leaves = tuple(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees))
        return leaves, *(metrics(run, name) for name in ("train/loss", "gradient_norm", "eval/loss"))

    def ends_alike(self, run: Path, resume: str) -> tuple[str, str]:
        """Resume; return resumed, lost or wrong, and what is to be said of it."""
        code, errors = self.run(f"{self.settings} --out {run} --resume {resume}")
        if code:
            return "lost", f"exit code {code}: {errors}"
        return ("resumed", "") if self.ending(run) == self.expected else ("wrong", "other bits")


Act = Callable[[subprocess.Popen[str]], None]


def break_process(campaign: Campaign, run: Path, act: Act, codes: set[int], **start: int) -> tuple[str, str]:
    """Do something to a running process, which must leave with one of `codes`; resume."""
    process = campaign.start(f"{campaign.settings} --out {run}", **start)
    act(process)
    code, errors = campaign.end(process)
    if code == 0:
        return "too late", ""
    if code not in codes or (code > 0 and len(errors.splitlines()) > 1):
        return "wrong", f"exit code {code}: {errors}"
    return campaign.ends_alike(run, "latest")


def at_random(campaign: Campaign, run: Path, number: signal.Signals) -> Act:
    """Send a signal at any moment of a run: three in ten before its first evaluation, else after a number of steps."""
    moment = campaign.random.uniform(0.0, 0.3) * campaign.seconds if campaign.random.random() < 0.3 else None
    lines, pause = campaign.random.randrange(1, STEPS), campaign.random.uniform(0.0, 0.05)

    def act(process: subprocess.Popen[str]) -> None:
        log = run / "metrics.jsonl"
        while moment is None and process.poll() is None and not (log.exists() and log.read_text().count("\n") > lines):
            time.sleep(0.005)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause if moment is None else moment)
        process.send_signal(number)

    return act


def killed(campaign: Campaign, run: Path) -> tuple[str, str]:
    """kill -9 at any moment."""
    return break_process(campaign, run, at_random(campaign, run, signal.SIGKILL), {-signal.SIGKILL})


def killed_while_saving(campaign: Campaign, run: Path) -> tuple[str, str]:
    """kill -9 while a checkpoint, any but the first, is half written."""
    after = campaign.random.randrange(1, STEPS // INTERVAL - 1) * INTERVAL
    pause = campaign.random.uniform(0.0, 0.01)

    def act(process: subprocess.Popen[str]) -> None:
        saved = run / "checkpoints"
        while process.poll() is None:
            names = {path.name for path in saved.iterdir()} if saved.is_dir() else set()
            if any("tmp" in name and int(name.partition(".")[0]) > after for name in names):
                time.sleep(pause)
                process.kill()
                return

    return break_process(campaign, run, act, {-signal.SIGKILL})


def terminated(campaign: Campaign, run: Path) -> tuple[str, str]:
    """SIGTERM at any moment: saved, exit code 75; before the run has begun, the signal itself."""
    return break_process(campaign, run, at_random(campaign, run, signal.SIGTERM), {75, -signal.SIGTERM})


def one_of_two_killed(campaign: Campaign, run: Path) -> tuple[str, str]:
    """kill -9 of one of two processes at any moment; the other must end by itself, and both are started again."""
    expected, victim = campaign.expected_of_two, campaign.random.randrange(2)
    arguments = f"{campaign.settings} --out {run}"
    processes = campaign.start_two(arguments)
    at_random(campaign, run, signal.SIGKILL)(processes[victim])
    campaign.end(processes[victim])
    code, errors = campaign.end(processes[1 - victim])
    if code == 0:
        return "too late", ""
    if code not in (1, 2):
        return "wrong", f"the other process ended with exit code {code}: {errors}"
    ends = [campaign.end(process) for process in campaign.start_two(f"{arguments} --resume latest")]
    if any(code for code, _ in ends):
        return "lost", f"exit codes and errors {ends}"
    return ("resumed", "") if campaign.ending(run) == expected else ("wrong", "other bits")


def disk_full(campaign: Campaign, run: Path) -> tuple[str, str]:
    """No file may have more than some bytes: which are written last differ from trial to trial."""
    most = max(path.stat().st_size for path in (campaign.folder / "unbroken" / "checkpoints").rglob("*"))
    largest = int(most / 512 * campaign.random.uniform(0.05, 1.0))
    return break_process(campaign, run, lambda process: None, {1}, largest_file=largest)


def damage(harm: Callable[[random.Random, bytes], bytes | None]) -> Callable[[Campaign, Path], tuple[str, str]]:
    """A trial that does harm to one file of the newest checkpoint (None: it is deleted)."""

    def trial(campaign: Campaign, run: Path) -> tuple[str, str]:
        shutil.copytree(campaign.broken, run)
        folders = [path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
        newest = max(folders, key=lambda path: int(path.name))
        file = campaign.random.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        what = f"{file.relative_to(run)}: "
        content = harm(campaign.random, file.read_bytes())
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        code, errors = campaign.run(f"{campaign.settings} --out {run} --resume")
        if code == 0:
            return ("resumed", what) if campaign.ending(run) == campaign.expected else ("wrong", what + "other bits")
        if code != 2 or len(errors.splitlines()) != 1 or str(newest) not in errors:
            return "wrong", f"{what}exit code {code}: {errors}"
        outcome, why = campaign.ends_alike(run, "latest-good")
        return ("refused" if outcome == "resumed" else outcome), what + (why or errors)

    return trial


def flipped(randomness: random.Random, data: bytes) -> bytes:
    """One bit is another."""
    changed = bytearray(data)
    changed[randomness.randrange(len(data))] ^= 1 << randomness.randrange(8)
    return bytes(changed)


KINDS: dict[str, Callable[[Campaign, Path], tuple[str, str]]] = {
    "kill -9": killed,
    "kill -9 during a save": killed_while_saving,
    "SIGTERM": terminated,
    "kill -9 of one of two": one_of_two_killed,
    "disk full": disk_full,
    "flipped bit": damage(flipped),
    "truncated file": damage(lambda randomness, data: data[: randomness.randrange(len(data))]),
    "deleted file": damage(lambda randomness, data: None),
    "empty file": damage(lambda randomness, data: b""),
}


def campaign_of(trials: int, seed: int, kinds: list[str], folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield kind, outcome and what is to be said of it, trial by trial; kinds take turns."""
    campaign = Campaign(folder, random.Random(seed))
    campaign.prepare()
    for number in range(trials):
        kind = kinds[number % len(kinds)]
        run = folder / f"trial{number}"
        outcome, why = KINDS[kind](campaign, run)
        yield kind, outcome, " ".join(why.split())
        shutil.rmtree(run, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Run the campaign and print its table; exit code 1 if a run was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args(arguments)
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for kind, outcome, why in campaign_of(options.trials, options.seed, options.kinds, Path(folder)):
            counts[kind, outcome] += 1
            print(f"{kind:<22}  {outcome:<9}{why[:400]}", flush=True)
    print(f"\n| fault | trials | {' | '.join(OUTCOMES)} |\n|{' --- |' * (len(OUTCOMES) + 2)}")
    for kind in (*options.kinds, "all"):
        row = [sum(n for (k, o), n in counts.items() if o == outcome and kind in (k, "all")) for outcome in OUTCOMES]
        print(f"| {kind} | {sum(row)} | {' | '.join(map(str, row))} |")
    return int(any(outcome in ("lost", "wrong") for _, outcome in counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
