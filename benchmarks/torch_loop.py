"""nanoGPT's training loop, written plainly in PyTorch: memory-mapped tokens, random windows, a log, evaluations."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from measure import cores
from peers import torch_gpt

from jaxgpt.config import TrainConfig

LossOf = Callable[[Any, Any], Any]  # (inputs, targets) -> their mean loss
SAMPLED = 20  # batches of each split that an evaluation reads (nanoGPT's eval_iters for a CPU)


def write_splits(text: Path, folder: Path) -> int:
    """Each character as its number among the sorted ones, the first 90% and the rest; return how many there are."""
    characters = text.read_text("utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(characters)))}
    ids = np.array([numbers[character] for character in characters], np.uint16)
    cut = len(ids) * 9 // 10
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    return len(numbers)


def torch_run(peer: str, config: TrainConfig, folder: Path) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    """A function that trains a new model by nanoGPT's loop; what it imports is imported before.

    It takes (steps, the steps between evaluations or None, seed) and returns `seconds`, from the model's making to the
    end of the last step; `seconds_after_first`, from the end of the first step on; and the `held_out` loss over the
    whole last 10%, which is not in the time. All cores, SDPA, fused AdamW, the loss read and written at every step.

    Args:
        peer: see `peers.torch_gpt`.
        folder: where the splits are (see `write_splits`), and the log is to be.
    """
    import torch
    import transformers
    from plain_gpt import adamw

    torch.set_num_threads(cores())
    transformers.logging.set_verbosity_error()
    random_batch = functools.partial(_random_batch, folder, config.data.batch_size, config.sequence_length)

    def run(steps: int, interval: int | None, seed: int) -> dict[str, Any]:
        start = first = time.perf_counter()
        torch.manual_seed(seed)
        model, logits_of = torch_gpt(peer, config.model)
        optimizer = adamw(model, config.optimizer)

        def loss_of(inputs: Any, targets: Any) -> Any:
            return torch.nn.functional.cross_entropy(logits_of(inputs).flatten(0, 1), targets.flatten())

        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            batch = random_batch("train")
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step, steps)
                if interval is not None and step % interval == 0:
                    _evaluate(model, loss_of, random_batch, log)
                loss = loss_of(*batch)
                batch = random_batch("train")
                loss.backward()
                if config.optimizer.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                log.write(f"step {step} loss {loss.item():.4f}\n")
                first = time.perf_counter() if step == 0 else first
            if interval is not None:
                _evaluate(model, loss_of, random_batch, log)
        end = time.perf_counter()
        model.eval()
        held_out = _held_out(loss_of, folder, config.sequence_length)
        return {"seconds": end - start, "seconds_after_first": end - first, "held_out": held_out}

    return run, {}


def _windows(data: np.ndarray, starts: Iterable[int], length: int) -> tuple[Any, Any]:
    """Inputs and targets (B, T), int64, from these places on."""
    import torch

    def at(shift: int) -> Any:
        return torch.stack([torch.from_numpy(data[i + shift : i + shift + length].astype(np.int64)) for i in starts])

    return at(0), at(1)


def _random_batch(folder: Path, rows: int, length: int, split: str) -> tuple[Any, Any]:
    import torch

    data = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")  # anew, as nanoGPT does, or it is kept
    return _windows(data, torch.randint(len(data) - length, (rows,)).tolist(), length)


def _evaluate(model: Any, loss_of: LossOf, random_batch: Callable[[str], tuple[Any, Any]], log: TextIO) -> None:
    """The mean loss of some batches of each split, as nanoGPT estimates it, into the log."""
    import torch

    model.eval()
    with torch.no_grad():
        for split in ("train", "val"):
            mean = np.mean([loss_of(*random_batch(split)).item() for _ in range(SAMPLED)])
            log.write(f"{split} {mean:.4f}\n")
    model.train()


def _held_out(loss_of: LossOf, folder: Path, length: int) -> float:
    """The loss over the whole held-out split, in windows side by side."""
    import torch

    data = np.memmap(folder / "val.bin", dtype=np.uint16, mode="r")
    total, starts = 0.0, range(0, len(data) - length, length)
    with torch.no_grad():
        for first in range(0, len(starts), 100):
            part = starts[first : first + 100]
            total += loss_of(*_windows(data, part, length)).item() * len(part)
    return total / len(starts)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine: nanoGPT's schedule."""
    peak, floor, warmup = (
        config.optimizer.learning_rate,
        config.optimizer.final_learning_rate,
        config.optimizer.warmup_steps,
    )
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return floor + 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) * (peak - floor)
