"""The process around the program: right sums, flags that are appended, a cache folder that the user can move."""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from jaxgpt import environment
from jaxgpt.environment import cache_folder, use_compilation_cache

ROOT = Path(__file__).parents[1]
MISCOMPILES = importlib.metadata.version("jaxlib") in environment.MISCOMPILING_JAXLIB
FUSION = f"{environment.FUSION_FLAG}={environment.FUSION_VALUE}"
COUNT = f"{environment.DEVICE_COUNT_FLAG}=4"


def python(program, **variables):
    """Run a program in a process of its own with these variables, and none of ours; return its last line as JSON."""
    ours = ("XLA_FLAGS", "NPROC", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_PLATFORMS")
    # JAX itself sets some of the TPU's when it is imported beside libtpu.
    kept = {key: value for key, value in os.environ.items() if key not in ours and not key.startswith("TPU_")}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


SHOW = "import json, os, jaxgpt; print(json.dumps([os.environ.get('XLA_FLAGS', ''), os.environ.get('NPROC')]))"


def test_a_fused_sum_is_the_right_sum():
    """jax-ml/jax#39103: with the faulty fusion the last row differs from what is computed step by step."""
    program = """
import json, jaxgpt, jax, jax.numpy as jnp
n = 32769
x = jnp.stack((jnp.arange(n, dtype=jnp.float32), jnp.zeros(n), jnp.zeros(n)), axis=1)
f = jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))
print(json.dumps([float(f(x)[-1]), float(jax.jit(f)(x)[-1])]))
"""
    (eager, compiled), _ = python(program, JAX_PLATFORMS="cpu")
    assert eager == compiled == 32768.0**2


@pytest.mark.parametrize("own", ["", "--xla_cpu_enable_fast_min_max=false", COUNT])
def test_flags_are_appended(own):
    (flags, _), _ = python(SHOW, XLA_FLAGS=own)
    assert flags.split() == own.split() + [FUSION] * MISCOMPILES


def test_the_users_own_value_of_the_flag_is_kept():
    own = f"{environment.FUSION_FLAG}=LIBRARY_FUSION_TYPE_REDUCE"
    (flags, _), _ = python(SHOW, XLA_FLAGS=own)
    assert flags == own


@pytest.mark.parametrize(
    ("variables", "threads"),
    [({}, None), ({"XLA_FLAGS": COUNT}, "16"), ({"XLA_FLAGS": COUNT, "NPROC": "5"}, "5"), ({"NPROC": "5"}, "5")],
)
def test_simulated_devices_get_enough_threads(variables, threads):
    (_, number), _ = python(SHOW, **variables)
    assert number == threads


@pytest.mark.skipif(not MISCOMPILES, reason="this jaxlib needs no flag")
def test_a_flag_that_comes_too_late_is_said():
    _, quiet = python("import jax\n" + SHOW, JAX_PLATFORMS="cpu")
    _, warned = python("import jax; jax.devices()\n" + SHOW, JAX_PLATFORMS="cpu")
    assert "import jaxgpt first" in warned and "import jaxgpt first" not in quiet


PLATFORMS = (
    "import json, os, jaxgpt, jax; print(json.dumps([os.environ.get('JAX_PLATFORMS'), jax.config.jax_platforms]))"
)


@pytest.fixture
def useless_libtpu(tmp_path):
    """A libtpu that is installed and finds no TPU, which is as much as a test can have anywhere."""
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").write_text("def get_library_path(): return '/nowhere/libtpu.so'")
    if importlib.util.find_spec("jax_plugins") is not None:
        pytest.skip("another accelerator's plugin is installed, beside which nothing is set")
    return os.pathsep.join([str(tmp_path), str(ROOT)])


@pytest.mark.parametrize("first", ["", "import jax\n"])
def test_libtpu_is_not_loaded_where_there_is_no_tpu(useless_libtpu, first):
    said, errors = python(first + PLATFORMS + "; jax.devices()", PYTHONPATH=useless_libtpu)
    assert said == ["cpu", "cpu"] and errors == ""


@pytest.mark.parametrize("variables", [{"TPU_WORKER_ID": "0"}, {"JAX_FORCE_TPU_INIT": "1"}, {"JAX_PLATFORMS": ""}])
def test_who_speaks_of_a_tpu_gets_it(useless_libtpu, variables):
    (platforms, _), _ = python(SHOW.replace("XLA_FLAGS', ''", "JAX_PLATFORMS'"), PYTHONPATH=useless_libtpu, **variables)
    assert platforms == variables.get("JAX_PLATFORMS")


def test_a_tpu_on_the_bus_is_seen(useless_libtpu, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("TPU_", "JAX_PLATFORMS"))]:
        monkeypatch.delenv(name)
    monkeypatch.syspath_prepend(useless_libtpu.split(os.pathsep)[0])
    monkeypatch.setattr(environment, "PCI_DEVICES", tmp_path)
    assert environment._libtpu_is_in_vain()
    for place, vendor in (("00:01.0", "0x8086"), ("00:05.0", environment.GOOGLE)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "vendor").write_text(vendor + "\n")
    assert not environment._libtpu_is_in_vain()


def test_the_cache_lies_where_the_user_says(monkeypatch):
    monkeypatch.setenv("JAXGPT_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("JAXGPT_CACHE")
    assert cache_folder() == Path("/xdg/jaxgpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/me/.cache/jaxgpt")


@pytest.fixture
def compilation_cache_setting():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    yield lambda: jax.config.values["jax_compilation_cache_dir"]
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_unless_the_user_keeps_them_already(
    monkeypatch, tmp_path, compilation_cache_setting
):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "jaxgpt"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    use_compilation_cache()
    assert compilation_cache_setting() == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache()
    assert (tmp_path / "jaxgpt") in Path(compilation_cache_setting()).parents
    assert importlib.metadata.version("jaxlib") in compilation_cache_setting()


@pytest.mark.parametrize(("width", "arenas"), [(None, 1), (128, None), (383, None), (384, 1), (768, 1)])
def test_the_threads_of_wide_models_share_an_arena(monkeypatch, width, arenas):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc has these settings")
    settings = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=settings.__setitem__))
    environment.keep_freed_memory(width)
    assert settings == {-1: -1, -4: 0} | ({} if arenas is None else {-8: arenas})
