"""What `jaxgpt prepare` does, done by a cluster: the same functions on Ray Data or on Apache Beam.

The corpus and the folder must lie where all machines see them under the same path, and jaxgpt be installed on each. See
docs/large-corpora.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxgpt.data.workers import Mapper


def on_ray(**resources: Any) -> Mapper:
    """Run on the Ray cluster that this process is connected to (`ray.init`), or on a new local one.

    Args:
        resources: of one task, as `ray.data.Dataset.map` takes them: `num_cpus`, `memory`, ...
    """
    return functools.partial(_on_ray, {"num_cpus": 1} | resources)


def _on_ray(resources: dict[str, Any], function: Callable[[Any], Any], values: Sequence[Any]) -> Iterator[Any]:
    if not values:
        return
    import ray.data

    items = ray.data.from_items(list(values), override_num_blocks=len(values))
    for row in items.map(functools.partial(_on_row, function), **resources).iter_rows():
        yield row["item"]


def _on_row(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    return {"item": function(row["item"])}


def on_beam(options: Any = None) -> Mapper:
    """Run as a pipeline of Apache Beam, which gives nothing back: how far it is, its runner shows.

    Args:
        options: `apache_beam.options.pipeline_options.PipelineOptions`: which runner, and where (default: a local one).
    """
    return functools.partial(_on_beam, options)


def _on_beam(options: Any, function: Callable[[Any], Any], values: Sequence[Any]) -> Iterator[Any]:
    if not values:
        return
    import apache_beam as beam

    with beam.Pipeline(options=options) as pipeline:
        _ = pipeline | beam.Create(values) | beam.Reshuffle() | beam.Map(function)
    yield from ()
