"""Eight virtual devices stand in for accelerators; annotations of shapes and dtypes are checked on every call."""

import os

from program import DEVICE_COUNT_FLAG, PLAIN_FUSIONS

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICE_COUNT_FLAG}=8 {PLAIN_FUSIONS}".strip()

# Most of a test's time is compilation. What is tested is what a program computes, not how fast; some of the
# whole-program tests run with everything on.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# The hub's library reads this when it is imported; no test may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

# Before anything imports jaxgpt: the hook rewrites functions as their modules are loaded.
install_import_hook("jaxgpt", "beartype.beartype")

from pathlib import Path

import pytest

import jaxgpt  # noqa: F401  (sets the number of threads the virtual devices need, before JAX starts)

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Data that does not belong to the project; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED.name} beside the checkout, which is absent")
    return SHARED


@pytest.fixture
def x64():
    """float64 for one test: equality in it is equality of the mathematics."""
    import jax

    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs_are_kept(tmp_path_factory):
    """On disk, for this worker and what it starts: most of what tests compile is compiled again, by another test."""
    import jax

    jax.devices()  # XLA reads its flags; libtpu, which a test loads, reads them too, and aborts at one that it lacks
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(PLAIN_FUSIONS, "").strip()
    folder = str(tmp_path_factory.mktemp("programs"))
    for name, value in (("jax_compilation_cache_dir", folder), ("jax_persistent_cache_min_compile_time_secs", 0.0)):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """A compiled program holds dozens of memory maps, and a process may have 65,530: a whole suite's do not fit."""
    yield
    import jax

    jax.clear_caches()


def pytest_collection_modifyitems(items):
    """The file that takes longest begins first, lest one worker be at it when the others are done."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
