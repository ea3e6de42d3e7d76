"""What people run today, at its documented best for the CPU, to be measured beside jaxgpt."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import cores

from jaxgpt.config import FinetuneConfig, GPTConfig, TrainConfig, require
from jaxgpt.models.heads import HEAD
from jaxgpt.storage.huggingface import config_to_hf
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.weights import export_tensors

# (prompts (B, T), how many new tokens) -> the new tokens of each
Generator = Callable[[np.ndarray, int], list[list[int]]]
# Arguments of the program below: a Hugging Face folder, the folder to make.
CONVERT = "from ctranslate2.converters.transformers import main; main()"


def require_torch(config: GPTConfig) -> None:
    """Raise `ValueError` unless torch and transformers are installed and the model is one that both peers can be."""
    if not all(importlib.util.find_spec(package) for package in ("torch", "transformers")):
        raise ValueError("--vs torch and plain need torch and transformers: pip install torch transformers")
    config_to_hf(config, None)
    plain = config.norm == "pre" and config.tied_head and config.activation == "gelu_new" and config.scale_attention
    require(plain and not config.scale_attention_by_layer, "beside PyTorch the model must be GPT-2's, of any size")


def torch_train_step(
    peer: str, config: TrainConfig, tokens: np.ndarray, tensors: Mapping[str, np.ndarray], compiled: bool
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """GPT-2 in PyTorch, with our weights: a function that runs one training step, and what is known of it.

    Same shape, batch, clipping and AdamW settings as ours; float32, all cores, `scaled_dot_product_attention`, the
    fused AdamW, gradients freed as soon as they are used. Learning rate constant: a schedule costs nothing.

    Args:
        peer: `torch`, the GPT-2 of `transformers`, or `plain`, that of `plain_gpt`.
        tokens: (B, T + 1) token ids; the model predicts each from those before it.
        tensors: the weights, as GPT-2's files name them.
        compiled: through `torch.compile`, but for the optimiser.
    """
    import torch
    from plain_gpt import adamw

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    vocab_size = config.model.vocab_size
    model, logits_of = torch_gpt(peer, config.model, tensors)
    optimizer = adamw(model, config.optimizer)
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64)).reshape(-1)

    def loss_of_batch() -> Any:
        return torch.nn.functional.cross_entropy(logits_of(inputs).view(-1, vocab_size), targets)

    forward = torch.compile(loss_of_batch) if compiled else loss_of_batch

    def step() -> dict[str, Any]:
        loss = forward()
        loss.backward()
        if config.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item()}

    # Parameters and the two moments, which the first step makes.
    return step, {"state_bytes": 3 * sum(p.numel() * p.element_size() for p in model.parameters())}


def torch_gpt(
    peer: str, config: GPTConfig, tensors: Mapping[str, np.ndarray] | None = None
) -> tuple[Any, Callable[[Any], Any]]:
    """A model for training, and a function of tokens (B, T) that gives its logits (B, T, V); see `torch_train_step`.

    Without `tensors` it is drawn as GPT-2's.
    """
    import torch
    import transformers
    from plain_gpt import PlainGPT

    if peer == "plain":
        plain = PlainGPT(config).train()
        if tensors is not None:
            plain.load(tensors)
        return plain, plain
    transformers.logging.set_verbosity_error()
    described = config_to_hf(config, None) | {"attn_implementation": "sdpa"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**described)).train()
    if tensors is not None:
        named = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
        model.load_state_dict(named, strict=False)  # the head is the embedding, which has one name here
    return model, lambda tokens: model(tokens, use_cache=False).logits


def torch_classifier_step(
    config: FinetuneConfig, parameters: Any, batch: Mapping[str, np.ndarray]
) -> tuple[Callable[[], float], dict[str, Any]]:
    """`GPT2ForSequenceClassification` of `transformers` with our weights: a function that runs one training step.

    Same examples, clipping and AdamW settings as ours; float32, all cores, `scaled_dot_product_attention`, the fused
    AdamW.

    Args:
        batch: see `ExampleBatches.batch`; the vocabulary's last id is in none of its examples, and pads them.

    Raises:
        ValueError: torch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError("--vs torch needs torch and transformers: pip install torch transformers") from error
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    model_config, settings = config.model, config.optimizer
    described: dict[str, Any] = config_to_hf(model_config, None)
    pad = (model_config.vocab_size or 0) - 1
    described |= {"pad_token_id": pad, "num_labels": len(config.labels), "attn_implementation": "sdpa"}
    del described["model_type"], described["architectures"]
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**described)).train()
    named = dict(model.named_parameters())
    gpt = {name: leaf for name, leaf in parameters.items() if name != HEAD}
    tensors = export_tensors(model_config, by_path(gpt)) | {"score.weight": np.asarray(parameters[HEAD]["kernel"]).T}
    with torch.no_grad():
        for name, value in tensors.items():
            named[name].copy_(torch.tensor(np.array(value)))
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)
    real = np.arange(batch["tokens"].shape[2]) <= batch["last"]
    inputs = torch.from_numpy(np.where(real, batch["tokens"][:, 0], pad).astype(np.int64))
    mask, labels = torch.from_numpy(real.astype(np.int64)), torch.from_numpy(batch["label"].astype(np.int64))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(inputs, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(named.values()), settings.clip_norm)
        optimizer.step()
        return loss.item()

    return step, {}


def require_generators(names: Sequence[str]) -> None:
    """Raise `ValueError` unless what the peers `hf` and `ctranslate2` need is installed."""
    needed = {"hf": ("torch", "transformers"), "ctranslate2": ("ctranslate2", "torch", "transformers")}
    for name in names:
        if not all(importlib.util.find_spec(package) for package in needed[name]):
            packages = needed[name]
            listed = f"{', '.join(packages[:-1])} and {packages[-1]}"
            raise ValueError(f"--vs {name} needs {listed}: pip install {' '.join(packages)}")


def hf_generator(folder: Path) -> Generator:
    """Greedy `generate` of `transformers` in PyTorch: float32, all cores, SDPA, its key-value cache."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(cores())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()

    def generate(prompts: np.ndarray, new_tokens: int) -> list[list[int]]:
        inputs = torch.from_numpy(prompts.astype(np.int64))
        limits = dict.fromkeys(("min_new_tokens", "max_new_tokens"), new_tokens)
        with torch.inference_mode():
            mask = torch.ones_like(inputs)
            made = model.generate(
                inputs, attention_mask=mask, do_sample=False, use_cache=True, pad_token_id=0, **limits
            )
        return made[:, inputs.shape[1] :].tolist()

    return generate


def ctranslate2_generators(folder: Path) -> dict[str, Generator]:
    """Greedy `generate_batch` of CTranslate2 in float32 and in int8, one batch on all cores."""
    import ctranslate2

    converted = folder.with_name(f"{folder.name}-ctranslate2")
    # In a process of its own, which takes the copies of the weights that converting needs away with it.
    command = [sys.executable, "-c", CONVERT, "--model", str(folder), "--output_dir", str(converted)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"CTranslate2 cannot convert the model: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    words = json.loads((converted / "vocabulary.json").read_text("utf-8"))
    config = json.loads((converted / "config.json").read_text("utf-8"))
    # Our tokenizer has no unknown token, and CTranslate2 does not read a model without one.
    (converted / "config.json").write_text(json.dumps(config | {"unk_token": config["eos_token"]}), "utf-8")

    def generator(compute_type: str) -> Generator:
        model = ctranslate2.Generator(str(converted), compute_type=compute_type, inter_threads=1, intra_threads=cores())

        def generate(prompts: np.ndarray, new_tokens: int) -> list[list[int]]:
            results = model.generate_batch(
                [[words[token] for token in prompt] for prompt in prompts.tolist()],
                min_length=new_tokens,
                max_length=new_tokens,
                sampling_topk=1,
                include_prompt_in_result=False,
                end_token=[],  # it may be made, and ends nothing: as in ours
            )
            return [result.sequences_ids[0] for result in results]

        return generate

    return {f"ctranslate2 {name}": generator(name) for name in ("float32", "int8")}
