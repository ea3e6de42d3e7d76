"""How tests run the real command line: in a process of its own, as a user would."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
# XLA's older way to compile fusions takes a third of the time. An XLA that does not know the flag would abort.
JAXLIB = importlib.metadata.version("jaxlib")
PLAIN_FUSIONS = "--xla_cpu_use_fusion_emitters=false" if JAXLIB.startswith("0.10.") else ""
SMALL = "--model.layers 2 --model.heads 2 --model.width 16 --model.context 16 --data.tokenizer byte --sample-tokens 8"


def write_text(folder: Path, size: int = 6000) -> Path:
    """A text with some order in it, made by rule."""
    path = folder / "text.txt"
    path.write_text("".join(f"{n} times {n % 7} is {n * (n % 7)}.\n" for n in range(size // 16)), "utf-8")
    return path


def environment(cache: Path, devices: int = 1, optimised: bool = False) -> dict[str, str]:
    """The user's environment with `devices` virtual devices and a cache of its own.

    Args:
        optimised: all optimisations on, as the user has them, and programs compiled anew; else compiled quickly, and
            those that an earlier test compiled are read.
    """
    ours = {"NPROC", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR"} if optimised else set()
    flags = [] if optimised else [PLAIN_FUSIONS]
    if devices > 1:
        flags.append(f"{DEVICE_COUNT_FLAG}={devices}")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return kept | {"JAXGPT_CACHE": str(cache), "XLA_FLAGS": " ".join(flags), "PYTHONUNBUFFERED": "1"}


def start(
    arguments: str, cache: Path, devices: int = 1, cwd: Path = ROOT, optimised: bool = False
) -> subprocess.Popen[str]:
    """Start `python train.py ARGUMENTS` (or `jaxgpt ARGUMENTS` where they begin with another verb)."""
    words = arguments.split()
    command = ["-m", "jaxgpt", *words] if words[0] == "generate" else [str(ROOT / "train.py"), *words]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=environment(cache, devices, optimised) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(arguments: str, cache: Path, devices: int = 1, code: int = 0, optimised: bool = False) -> tuple[str, str]:
    """Run to the end, check the exit code, return what was printed to the two streams."""
    process = start(arguments, cache, devices, optimised=optimised)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(
    arguments: str,
    cache: Path,
    devices: int = 1,
    own: tuple[str, str] = ("", ""),
    cwd: tuple[Path, Path] = (ROOT, ROOT),
) -> list[subprocess.Popen[str]]:
    """Start a run of two processes; `own` are further arguments of each, and `cwd` is where it stands."""
    common = f"{arguments} --hosts.coordinator 127.0.0.1:{free_port()} --hosts.processes 2 --hosts.process"
    return [start(f"{common} {number} {own[number]}", cache, devices, cwd[number]) for number in range(2)]


def end_two(processes: list[subprocess.Popen[str]], *codes: int) -> list[tuple[str, str]]:
    """Wait for both, check their exit codes, return what each printed, the lines of the Gloo library left out."""
    printed = [process.communicate(timeout=300) for process in processes]
    assert tuple(process.returncode for process in processes) == codes, printed
    return [("".join(x for x in out.splitlines(True) if not x.startswith("[Gloo]")), err) for out, err in printed]


def metrics(folder: Path, name: str = "train/loss") -> dict[int, float]:
    """Step -> value, from metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {record["step"]: record[name] for record in records if name in record}


def wait_for(processes: Sequence[subprocess.Popen[str]], path: Path) -> None:
    """Return once `path` exists; none of the processes may end before."""
    while not path.exists():
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.01)
                raise AssertionError(process.communicate())


def stop_after(process: subprocess.Popen[str], path: Path, number: signal.Signals) -> int:
    """Send a signal once `path` exists; return the exit code."""
    wait_for([process], path)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode
