"""Imports point one way, and what is heavy or dangerous is not imported at all."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "jaxgpt").rglob("*.py"))
PARTS = [path.relative_to(ROOT) for path in MODULES]
# A part of the package may import those of a lower number, and itself.
RANK = {"config": 0, "environment": 0, "hosts": 0.5, "recipes": 1, "arguments": 1, "models": 1, "data": 1, "storage": 1}
RANK |= {
    "training": 2,
    "generation": 2,
    "tasks": 3,
    "reference": 3,
    "api": 4,
    "launch": 4,
    "compiled": 4,
    "plan": 5,
    "evaluate": 5,
    "verify": 5,
}
RANK |= {"apps": 6, "cli": 7, "__main__": 8, "__init__": 8}
ONLY = {"recipes": {"config"}, "arguments": {"config"}, "config": set(), "environment": set(), "hosts": {"config"}}
ONLY |= {"__init__": {"environment"}, "__main__": {"cli"}}
HEAVY = {"torch", "transformers", "matplotlib", "tensorboardX"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def imports(tree, everywhere=True):
    """Dotted names of what a module imports: anywhere in it, or only when it is loaded itself."""
    nodes = [*ast.iter_child_nodes(tree)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)


def parts_imported(tree):
    """First part below jaxgpt of each own module imported: `jaxgpt.models.gpt` is models."""
    return {name.split(".")[1] for name in imports(tree) if name.startswith("jaxgpt.")} & RANK.keys()


def part_of(path):
    return path.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", PARTS, ids=str)
def test_arrows_point_one_way(path):
    part = part_of(path)
    imported = parts_imported(ast.parse((ROOT / path).read_text("utf-8"))) - {part}
    wrong = {other for other in imported if RANK[other] >= RANK[part]}
    assert not wrong, f"{path} imports {wrong}"
    if part in ONLY:
        assert imported <= ONLY[part]


def test_the_walk_sees_every_arrow():
    tree = ast.parse(
        "def f():\n  if x:\n    from jaxgpt.api import load\nfrom jaxgpt import recipes\nimport jaxgpt.cli"
    )
    assert parts_imported(tree) == {"api", "recipes", "cli"}
    assert "jaxgpt.api" not in set(imports(tree, everywhere=False))
    assert {part_of(path) for path in PARTS} <= RANK.keys()


@pytest.mark.parametrize("path", [path for path in PARTS if part_of(path) == "data"], ids=str)
def test_data_is_numpy_only(path):
    names = {name.split(".")[0] for name in imports(ast.parse((ROOT / path).read_text("utf-8")))}
    assert not names & {"jax", "flax", "optax", "orbax"}


@pytest.mark.parametrize("path", PARTS, ids=str)
def test_what_is_heavy_is_imported_where_it_is_used(path):
    names = {name.split(".")[0] for name in imports(ast.parse((ROOT / path).read_text("utf-8")), everywhere=False)}
    assert not names & HEAVY
    assert "orbax" not in names or path.name == "checkpoint.py"


@pytest.mark.parametrize("path", PARTS, ids=str)
def test_nothing_unpickles_or_evaluates(path):
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    assert not {name.split(".")[0] for name in imports(tree)} & UNPICKLERS
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in {"eval", "exec", "torch.load", "yaml.load", "compile", "__import__"}, call
            allowed = [k.value for k in node.keywords if k.arg == "allow_pickle"]
            assert all(isinstance(value, ast.Constant) and value.value is False for value in allowed)


def loaded_after(program):
    """Names of the modules that are loaded once `program` has run in a process of its own."""
    script = f"{program}\nimport json, sys\nprint('\\n' + json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "program",
    [
        "import jaxgpt",
        "from jaxgpt.cli import main; main(['--help'])",
        "from jaxgpt.cli import main; main(['inspect', '--help'])",
        "from jaxgpt.cli import main; [main([verb, '--help']) for verb in 'train generate translate evaluate'.split()]",
        "from jaxgpt.cli import main; [main([verb, '--help']) for verb in 'export verify chat classify'.split()]",
        "from jaxgpt.cli import main; main(['train', '--stepz', '3'])",
        "import jaxgpt.data.batches, jaxgpt.data.shards, jaxgpt.storage.runs, jaxgpt.recipes",
    ],
)
def test_jax_is_not_loaded_before_it_is_needed(program):
    assert not loaded_after(program) & {"jax", "jaxlib", "flax", "optax", "orbax", *HEAVY}


def test_training_loads_nothing_that_only_some_need():
    loaded = loaded_after("import jaxgpt.api")
    assert "jax" in loaded and not loaded & HEAVY


def test_every_public_name_is_there():
    import jaxgpt

    assert {"load", "export", "train", "recipe", "GPT", "TrainConfig", "GenerationConfig"} <= set(jaxgpt.__all__)
    assert all(getattr(jaxgpt, name) is not None for name in jaxgpt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = jaxgpt.lode
