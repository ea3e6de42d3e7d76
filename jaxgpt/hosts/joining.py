"""How a process becomes one of several: what its launcher or its flags say, and JAX's distributed runtime."""

from __future__ import annotations

import itertools
import os
import threading
from typing import Any

from jaxgpt.config import Distributed, HostsConfig
from jaxgpt.hosts.exchange import Hosts

FLAGS = "--hosts.coordinator ADDRESS:PORT, --hosts.processes N and --hosts.process I"


def detected() -> str | None:
    """The launcher that started this process as one of several, as far as JAX can read from it where they are."""
    environ = os.environ
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # of this srun: a batch script by itself is no task of one
        return "Slurm"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
        return "Kubernetes"
    from jax._src import clusters

    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if "tpu" in kind.name]
    return "Cloud TPU" if any(kind.is_env_present() for kind in kinds) else None  # at once, where there is no TPU


def connect(mode: Distributed, config: HostsConfig) -> Hosts:
    """Become one of the processes of a run, or stay alone. Before anything is computed.

    If they do not all come together in `config.timeout`, the process says so in one line and ends with exit code 2.

    Raises:
        ValueError: `mode` is on, or a launcher was detected, and what is missing cannot be read from it.
    """
    if mode == "off":
        return Hosts()
    import jax
    from jax._src.distributed import global_state  # the key-value store has no public name

    given, launcher = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"), detected()
    asked = mode == "on" or (given, config.processes, config.process) != (None, None, None)
    if not (asked or launcher or jax.distributed.is_initialized()):
        return Hosts()
    if not jax.distributed.is_initialized():
        limit = threading.Timer(config.timeout, _nobody_there, [config, global_state])
        limit.daemon = True
        limit.start()
        try:
            jax.distributed.initialize(
                config.coordinator,
                config.processes,
                config.process,
                cluster_detection_method=None if None in (given, config.processes, config.process) else "deactivate",
                initialization_timeout=config.timeout + 60,  # its own end is an abort; the timer comes before it
                heartbeat_timeout_seconds=config.heartbeat,
            )
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            where = f"{launcher} was detected" if launcher else f"distributed is {mode}"
            raise ValueError(
                f"{where}, but the processes could not be joined ({reason}): give {FLAGS}, or --distributed off"
            ) from error
        finally:
            limit.cancel()
    client: Any = global_state.client
    index = global_state.process_id
    joined = client.key_value_increment(f"jaxgpt/joined/{index}", 1)  # runs of one process have different keys
    keys = (f"jaxgpt/{joined}/{number}" for number in itertools.count())
    hosts = Hosts(index, global_state.num_processes, client, keys)
    hosts.together(lambda: _same_devices(hosts.count))
    return hosts


def _same_devices(count: int) -> None:
    import jax

    if len(jax.devices()) != count * jax.local_device_count():
        raise ValueError(f"of {len(jax.devices())} devices, not each of {count} processes has as many")


def _nobody_there(config: HostsConfig, state: Any) -> None:
    """End the process: what waits is in the runtime, and cannot be interrupted otherwise."""
    where = state.coordinator_address or config.coordinator
    if state.process_id == 0:
        line = f"not all of {config.processes or 'the'} processes came to {where} within {config.timeout} s"
    else:
        line = f"the coordinator {where} did not answer within {config.timeout} s (--hosts.timeout)"
    say_and_leave(line, 2)


def say_and_leave(line: str, code: int) -> None:
    """End this process at once, from whatever thread: nothing is cleaned up, and nobody is waited for."""
    os.write(2, f"jaxgpt: {line}\n".encode())
    os._exit(code)
