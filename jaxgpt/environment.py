"""The process around the program: XLA's flags, the compilation cache, the user's cache folder."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from pathlib import Path

# Threads of XLA on CPU where their number must not depend on the machine; enough for 16 simulated devices.
THREADS = "16"
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
# jaxlib 0.10.2 computes wrong sums in some fused reductions on CPU (jax-ml/jax#39103). With this value single matrix
# products alone go to that library, which are right and faster there (a training step by 8%, a product of 8 rows by
# half); 0.10.1 is right without the flag, and an XLA that does not know it would abort.
FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
FUSION_VALUE = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
MISCOMPILING_JAXLIB = ("0.10.2",)
PCI_DEVICES = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # as a vendor on the PCI bus, where TPUs are; its network cards too
WIDE = 384  # a model's width from which on, on 2 cores, large blocks cost more than threads that wait for one another


def prepare_backend() -> None:
    """Set what XLA reads when it starts; called once, when `jaxgpt` is imported.

    Flags are appended, never replaced: what the user set stays. Simulated CPU devices wait for each other in threads,
    and with fewer threads than devices they wait for ever, so their number (NPROC) is raised when the flag is there.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if importlib.metadata.version("jaxlib") in MISCOMPILING_JAXLIB and FUSION_FLAG not in flags:
        if _backend_is_running():
            warnings.warn(
                f"JAX computed something before jaxgpt was imported, so {FUSION_FLAG} could not be set, and this "
                "version of jaxlib can compute wrong sums on CPU: import jaxgpt first",
                stacklevel=2,
            )
        flags = f"{flags} {FUSION_FLAG}={FUSION_VALUE}".strip()
        os.environ["XLA_FLAGS"] = flags
    if DEVICE_COUNT_FLAG in flags:
        os.environ.setdefault("NPROC", THREADS)
    if _libtpu_is_in_vain() and not _backend_is_running():
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:  # which has read the variable when it was imported
            sys.modules["jax"].config.update("jax_platforms", "cpu")


def fix_threads() -> None:
    """Let XLA on CPU have `THREADS` threads, whatever the cores: their number decides how it cuts a product's sums.

    Raises:
        ValueError: the user wants another number, or JAX has started with what the machine has.
    """
    given = os.environ.get("NPROC")
    if given == THREADS:
        return
    if given is not None:
        raise ValueError(f"strict-reproducibility computes with {THREADS} threads, but NPROC is {given}; unset it")
    if _backend_is_running():
        raise ValueError(
            f"strict-reproducibility computes with {THREADS} threads, and JAX runs already: set NPROC={THREADS} before"
        )
    os.environ["NPROC"] = THREADS


def _backend_is_running() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bool(getattr(bridge, "_backends", None))


def _libtpu_is_in_vain() -> bool:
    """Whether libtpu is installed, to plan with, where JAX would load it, find no TPU and print a page of its troubles.

    Not where anything speaks of a TPU or of a choice already made: a device of Google's on the PCI bus (where JAX too
    looks), one of the variables that say where a TPU is, JAX_PLATFORMS, or the plugin of another accelerator.
    """
    said = os.environ.keys() - {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}  # which JAX sets itself beside any libtpu
    if {"JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"} & said or any(name.startswith("TPU_") for name in said):
        return False
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax_plugins") is not None:
        return False
    if importlib.metadata.entry_points(group="jax_plugins"):
        return False
    return all(path.read_text().strip() != GOOGLE for path in PCI_DEVICES.glob("*/vendor"))


def cache_folder() -> Path:
    """Where what can be made again is kept: $JAXGPT_CACHE, or jaxgpt in the user's cache folder."""
    if own := os.environ.get("JAXGPT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxgpt"


def keep_freed_memory(width: int | None = None) -> None:
    """Let the process keep memory that it frees, where it runs on glibc.

    XLA on CPU allocates a program's temporaries anew each time it runs. glibc takes blocks above 32 MB from the system
    and gives them back at once, so that every step faults all its pages in again: an eighth to a fifth of a small
    model's step.

    Args:
        width: of a model that is to be trained. Threads then have arenas of their own unless it is `WIDE`: for one that
            all share they wait, in a narrow model's step a fifth of the time, in compilation a third; but those of
            threads cannot hold blocks above 64 MB, which wide ones need. None: one arena.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)
    if width is None or width >= WIDE:
        mallopt(arena_max, 1)


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second start is quick; a cache the user has set up is left alone."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    # Compiled for this processor by this jaxlib, for so many threads: entries of others are at best useless.
    version = "-".join([importlib.metadata.version("jaxlib"), platform.machine(), *_threads()])
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs" / version))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def _threads() -> list[str]:
    given = os.environ.get("NPROC")
    return [] if given is None else [f"{given}-threads"]
