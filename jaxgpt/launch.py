"""A training run as one call: what a task prepares, a layout, a run folder and the loop put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxgpt.config import (
    TASKS,
    ChatConfig,
    FinetuneConfig,
    GPTRunConfig,
    HostsConfig,
    RunConfig,
    TrainConfig,
    TranslationConfig,
    flatten,
    to_dict,
)
from jaxgpt.environment import fix_threads, keep_freed_memory, use_compilation_cache
from jaxgpt.hosts import Hosts, code_version, connect, without_hosts
from jaxgpt.storage.runs import RunFolder, latest_run_path, new_run_path
from jaxgpt.tasks import chat, finetuning, lm, translation
from jaxgpt.tasks.preparation import Prepared
from jaxgpt.tasks.trained import COMMANDS
from jaxgpt.training import loop
from jaxgpt.training.parallel import Layout, choose_layout
from jaxgpt.training.report import Reporter

RUNS = Path("runs")
# What may differ when a run is resumed: budgets, logging, and where it runs. The data is compared by its content.
BUDGETS = (
    "steps", "epochs", "evaluations", "max-seconds", "out", "resume", "average", "keep", "patience",
    "optimizer.max-skipped",
)  # fmt: skip
LOGGING = ("quiet", "tensorboard", "eval-interval", "checkpoint-interval", "log-interval", "watchdog-seconds")
SHOWN = ("sample-tokens", "sample-prompt", "samples", "validation-sentences", "validation-answers")
PLACES = (
    "data.path", "data.validation", "data.cache", "init-from", "parallel.strategy", "parallel.devices", "parallel.mesh",
    "parallel.gradient-accumulation", "parallel.virtual-shards", "distributed",
    *(f"hosts.{name}" for name in flatten(HostsConfig())),
)  # fmt: skip
# What need not be the same on all hosts: each may have the data, which is compared by its content, elsewhere.
OWN_OF_A_HOST = frozenset((*(name for name in PLACES if not name.startswith("parallel.")), "quiet"))
FREE_ON_RESUME = frozenset((*BUDGETS, *LOGGING, *SHOWN, *PLACES))
# What may not, in a run whose bits are to be the same: how a batch is cut into the sums that are added up.
STRICT = frozenset(("parallel.gradient-accumulation", "parallel.virtual-shards"))
PREPARE: Mapping[type[RunConfig], Callable[[Any, Callable[[str], None]], Prepared]] = {
    TrainConfig: lm.prepare,
    TranslationConfig: translation.prepare,
    FinetuneConfig: finetuning.prepare,
    ChatConfig: chat.prepare,
}


def run_path(config: RunConfig, recipe: str) -> Path:
    """The folder a run goes to: `config.out`; else, under runs/, the recipe's latest to resume, or a new one."""
    if config.out is not None:
        return Path(config.out)
    latest = latest_run_path(RUNS, recipe) if config.resume != "never" else None
    return latest or new_run_path(RUNS, recipe)


def train(
    config: RunConfig, *, recipe: str = "custom", report: Reporter | None = None, hosts: Hosts | None = None
) -> tuple[loop.Outcome, RunFolder]:
    """Train: data in; a trained model, its checkpoints, a curve and a sample out, all in the run folder.

    Args:
        config: the whole run (see `recipes`); its kind says what is learned.
        recipe: the name it is filed under.
        report: what a person sees (default: nothing).
        hosts: the processes that train together (default: `connect` as the config says).

    Returns:
        How it ended, and the run folder, which `load` (or, of a translation, `Translator`) reads.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: bad input, found before the first step.
        FloatingPointError, OSError: the run failed; its last checkpoint is good.
    """
    report = report or Reporter()
    if config.strict_reproducibility:
        fix_threads()
    use_compilation_cache()
    based = isinstance(config, GPTRunConfig) and config.init_from is not None  # on a model of another width
    keep_freed_memory(None if based else config.model.width)
    hosts = hosts or connect(config.distributed, config.hosts)
    run = RunFolder(Path(hosts.of_first(str(run_path(config, recipe)))), writes=hosts.first)
    if hosts.count > 1:
        same = {name: value for name, value in flatten(config).items() if name not in OWN_OF_A_HOST}
        hosts.compare({"code": code_version()} | same)
    resuming, layout, prepared = hosts.together(lambda: _prepare(config, run, report, hosts))
    hosts.compare({"data": prepared.data_fingerprint, "base model": prepared.base})
    if not resuming:
        hosts.together(run.create)
    hosts.check_shared(run.path)
    config = prepared.config
    task = next(name for name, kind in TASKS.items() if kind is type(config))
    base = {} if prepared.base is None else {"base": prepared.base}
    described = {"task": task, "recipe": recipe, "data": prepared.data_fingerprint}
    run.describe_as(described | base | {"config": to_dict(without_hosts(config))})
    if run.writes:
        prepared.tokenizer.save(run.tokenizer)
    for line in (*layout.notes, *prepared.announcement(layout)):
        report.say(line)
    report.begin(config.steps, prepared.task.unit)
    try:
        outcome = loop.train(prepared.task, config, run, layout, report, hosts)
    finally:
        report.finish()
    if not outcome.interrupted:
        prepared.conclude(run, report.say)
    return outcome, run


def _prepare(config: RunConfig, run: RunFolder, report: Reporter, hosts: Hosts) -> tuple[bool, Layout, Prepared]:
    """Whether an old run goes on, where it runs, and what: all that can be refused before anything is written."""
    resuming = config.resume != "never" and run.exists()
    if not resuming:
        run.check_free()
    unit, size = config.batch_unit
    layout = choose_layout(config.parallel, size, unit, config.strict_reproducibility, hosts.devices)
    prepared = PREPARE[type(config)](config, report.say)
    if resuming:
        _check_same_run(run, prepared)
    if layout.strategy == "mesh":
        layout.shardings(jax.eval_shape(prepared.task.init, jax.random.key(0)))  # refuses what cannot be cut
    return resuming, layout, prepared


def _check_same_run(run: RunFolder, prepared: Prepared) -> None:
    """Refuse to resume a run with data or settings that would make it another."""
    saved = run.saved_config()
    if type(saved) is not type(prepared.config):
        raise ValueError(f"{run.path} is a run of another task, {run.describe()['task']}")
    if run.describe()["data"] != prepared.data_fingerprint:
        raise ValueError(f"{run.path} was trained on other data, or with another tokenizer or split, than is given now")
    before = flatten(saved)
    free = FREE_ON_RESUME - STRICT if saved.strict_reproducibility else FREE_ON_RESUME
    for key, value in flatten(prepared.config).items():
        if key not in free and value != before[key]:
            raise ValueError(
                f"{run.path} was trained with {key} {before[key]}, not {value}; resume it without that flag"
            )


def summary(outcome: loop.Outcome, run: RunFolder) -> str:
    """The last lines a person sees."""
    if outcome.interrupted:
        return f"stopped at step {outcome.step:,} and saved; go on with --resume --out {run.path}"
    use = COMMANDS[type(run.saved_config())].format(run.path)
    return f"\neverything lies in {run.path}; to use it:\n{use}"
