"""A certificate is given to a sound model and withheld from a broken one. (Against PyTorch: test_torch.py.)"""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from test_api import model_with

from jaxgpt import api, verify
from jaxgpt.cli import main


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_head": False, "bias": False}, {"norm": "post", "activation": "relu"}, {"scale_attention": False}],
)
def test_a_sound_model_passes(changes):
    results = list(verify.checks(model_with(**changes)))
    assert len(results) >= 7 and all(check.passed for check in results), results


def test_a_damaged_model_does_not(tmp_path, capsys):
    model = model_with()
    api.export(model, tmp_path / "sound")
    assert main(["verify", "--model", str(tmp_path / "sound")]) == 0
    assert "FAIL" not in capsys.readouterr().out
    scale = model.parameters["final_norm"]["scale"].at[0].set(jnp.nan)
    final_norm = {**model.parameters["final_norm"], "scale": scale}
    broken = dataclasses.replace(model, parameters={**model.parameters, "final_norm": final_norm})
    api.export(broken, tmp_path / "broken")
    assert main(["verify", "--model", str(tmp_path / "broken"), "--json"]) == 1
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert results[0] == {"check": "weights that are not finite", "measured": 1.0, "bound": 0.0, "passed": False}


@pytest.mark.parametrize(
    ("what", "check"),
    [("attend_to_cache", "cached = uncached"), ("attention", "causality")],
)
def test_each_check_sees_what_it_is_for(monkeypatch, what, check):
    """Broken on purpose: a cache that is read wrongly, attention that sees the future."""
    from jaxgpt.models import layers
    from jaxgpt.models.attention import attention

    wrong = {
        "attend_to_cache": lambda query, cache, layer, **how: query,
        "attention": lambda query, key, value, **more: attention(query, key, value),
    }
    monkeypatch.setattr(layers, what, wrong[what])
    verify.logits.clear_cache()
    failed = [result.check for result in verify.checks(model_with(context=15)) if not result.passed]
    verify.logits.clear_cache()
    assert any(name.startswith(check) for name in failed)


def test_without_torch_the_reference_is_refused_in_words(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="needs torch and transformers: pip install"):
        next(verify.checks(model_with(), reference="hf"))
