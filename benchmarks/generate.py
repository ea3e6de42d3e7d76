"""Speed of greedy generation: `python benchmarks/generate.py [--size 124M] [--vs hf ctranslate2] [--json]`.

A GPT of random weights continues random prompts of one length; the peers have the same weights, and take turns with us.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
import jax
import numpy as np
import tokenizers
from measure import PAUSE_SECONDS, agreement, environment, seconds_of, spelled, spread
from peers import Generator, ctranslate2_generators, hf_generator, require_generators

from jaxgpt.api import LanguageModel, export
from jaxgpt.arguments import parse
from jaxgpt.config import GenerationConfig, GPTConfig, Weights, gpt_size, require
from jaxgpt.data.tokenizer import END_OF_TEXT, Tokenizer
from jaxgpt.environment import keep_freed_memory
from jaxgpt.generation.decode import guess
from jaxgpt.models.blocks import compact_parameters
from jaxgpt.models.gpt import init_parameters
from jaxgpt.training.metrics import count_parameters


@dataclass(frozen=True)
class Options:
    """Measure greedy generation."""

    size: str = "124M"
    """tiny, 124M, 355M, 774M or 1558M"""
    vocab_size: int = 50257
    """tokens of the vocabulary"""
    batch: tuple[int, ...] = (1, 8)
    """prompts at once, one number or several"""
    prompt_tokens: int = 64
    """tokens of each prompt"""
    repeat: int = 0
    """let each prompt be so many random tokens, again and again: text that repeats itself (0: all random)"""
    init_std: float = 0.1
    """of the weights; with the usual 0.02 a model says the last token again and again, and agreement shows nothing"""
    new_tokens: int = 64
    """tokens made for each"""
    rounds: int = 5
    """rounds; in each, everyone makes the text and then a single token"""
    vs: tuple[Literal["hf", "ctranslate2"], ...] = ()
    """measure transformers in PyTorch, CTranslate2 (float32 and int8), or both, in the same run"""
    weights: tuple[Weights, ...] = ()
    """measure ours with its matrices kept in fewer bits as well: int8, bfloat16, or both"""
    lookup: int = 0
    """measure ours with that many tokens guessed ahead as well"""
    seed: int = 0
    """of the weights and the prompts"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(value >= 1, f"{option} is {value}; it must be at least 1")
        require(bool(self.batch) and min(self.batch) >= 1, f"batch is {self.batch}; each must be at least 1")
        require(self.vocab_size >= 2, f"vocab-size is {self.vocab_size}; it must be at least 2")
        require(self.repeat >= 0, f"repeat is {self.repeat}; it must be at least 0")
        require(self.init_std > 0, f"init-std is {self.init_std}; it must be positive")
        require(self.lookup >= 0, f"lookup is {self.lookup}; it must be at least 0")
        require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must be in [0, 2**31)")


def configure(options: Options) -> GPTConfig:
    """The model's shape; it must have room for the text."""
    config = gpt_size(options.size, vocab_size=options.vocab_size, init_std=options.init_std)
    wanted = options.prompt_tokens + options.new_tokens
    require(wanted <= config.context, f"{wanted} tokens do not fit the context of {config.context}")
    return config


def word_tokenizer(size: int) -> Tokenizer:
    """A tokenizer whose tokens are numbered words, the last end-of-text: any ids have a text, as a real one's do."""
    vocabulary = {f"word{number}": number for number in range(size - 1)} | {END_OF_TEXT: size - 1}
    rust = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    rust.add_special_tokens([END_OF_TEXT])
    return Tokenizer(rust)


def our_generator(model: LanguageModel, lookup: int = 0) -> Generator:
    """What a user calls, with ids for prompts and nothing that ends a text early."""
    settings = GenerationConfig(temperature=0.0, stop_tokens=(), lookup=lookup)

    def generate(prompts: np.ndarray, new_tokens: int) -> list[list[int]]:
        generated = model.generate_batch(prompts.tolist(), settings, max_new_tokens=new_tokens)
        return [list(text.tokens) for text in generated]

    return generate


def generators(config: GPTConfig, options: Options) -> tuple[dict[str, Generator], int]:
    """Everyone who takes part, with the same weights; and how many parameters those are."""
    parameters = init_parameters(config, jax.random.key(options.seed))
    model, count = LanguageModel(config, parameters, word_tokenizer(options.vocab_size)), count_parameters(parameters)
    del parameters
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if options.vs:
            export(model, folder)
        models = {"ours": replace(model, parameters=model.decoding_parameters)}
        for name in options.weights:
            models[f"ours, {name}"] = replace(model, parameters=compact_parameters(model.parameters, name))
        del model  # the other layout has served
        found = {name: our_generator(one) for name, one in models.items()}
        if options.lookup:
            ahead = f", lookup {options.lookup}"
            found |= {name + ahead: our_generator(one, options.lookup) for name, one in models.items()}
        if "hf" in options.vs:
            found["hf"] = hf_generator(folder)
        if "ctranslate2" in options.vs:
            found |= ctranslate2_generators(folder)
    return found, count


def measure(found: dict[str, Generator], batch: int, options: Options) -> dict[str, Any]:
    """Time everyone on one batch, in turn."""
    new, period = options.new_tokens, options.repeat or options.prompt_tokens
    drawn = np.random.default_rng([options.seed, batch]).integers(0, options.vocab_size, (batch, period))
    prompts = np.resize(drawn.T, (options.prompt_tokens, batch)).T
    made = {}
    for name, generate in found.items():  # compiles, too
        generate(prompts, 1)
        made[name] = generate(prompts, new)
    whole: dict[str, list[float]] = {name: [] for name in found}
    first: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.rounds):
        for name, generate in found.items():
            for seconds, tokens in ((whole, new), (first, 1)):
                time.sleep(PAUSE_SECONDS)
                seconds[name].append(seconds_of(functools.partial(generate, prompts, tokens)))
    results: dict[str, dict[str, Any]] = {}
    for name in found:
        results[name] = {
            "tokens_per_second": spread([batch * new / value for value in whole[name]]),
            "first_token_seconds": spread(first[name]),
        }
        if name != "ours":
            results[name] |= {
                "ratio": spread([theirs / ours for ours, theirs in zip(whole["ours"], whole[name], strict=True)]),
                "first_token_ratio": statistics.median(
                    theirs / ours for ours, theirs in zip(first["ours"], first[name], strict=True)
                ),
                "agreement": agreement(made["ours"], made[name]),
            }
    for name in found:
        if "lookup" in name:
            results[name]["tokens_per_step"] = new / _steps(made[name], prompts, options.lookup)
    distinct = statistics.mean(len(set(row)) for row in made["ours"])
    return {"batch": batch, "distinct_tokens_per_text": distinct, "results": results}


def _steps(made: list[list[int]], prompts: np.ndarray, lookup: int) -> int:
    """How many steps it takes to make these texts together with so many tokens guessed ahead."""
    places, steps = [1] * len(made), 1  # the first comes with the prompt
    while any(place < len(text) for place, text in zip(places, made, strict=True)):
        for row, text in enumerate(made):
            ahead = guess([*prompts[row].tolist(), *text[: places[row]]], lookup)
            rest = text[places[row] :]
            right = next((n for n, (a, b) in enumerate(zip(ahead, rest, strict=False)) if a != b), lookup)
            places[row] += right + 1
        steps += 1
    return steps


def table(options: Options, result: dict[str, Any]) -> str:
    """The result for people."""
    about = result["environment"]
    period = f" ({options.repeat} again and again)" if options.repeat else ""
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("jax", *_packages(options)))
    lines = [
        ("model", f"{options.size}: {result['parameters'] / 1e6:.2f}M random parameters, float32"),
        ("task", f"{options.prompt_tokens} random prompt tokens{period}, {options.new_tokens} new ones, greedy"),
        ("machine", f"{about['processor']}, {about['cores']} cores; {versions}; {about['date']}"),
        ("figures", f"median (least to greatest) of {options.rounds} rounds in turn; tokens/s with the prompt's time"),
        ("ratio", "ours over theirs, median of the rounds' ratios; above 1 is faster"),
    ]
    for measured in result["batches"]:
        head = f"{'tokens/s':<31}{'first token, ms':<31}{'ratio':<8}{'of first':<10}same tokens"
        lines += [("", ""), (f"batch {measured['batch']}", f"{'':<24}{head}")]
        for name, row in measured["results"].items():
            rate, first = spelled(row["tokens_per_second"]), spelled(row["first_token_seconds"], 1e3)
            text = f"{name:<24}{rate:<31}{first:<31}"
            if "ratio" in row:
                ratio, of_first, same = row["ratio"]["median"], row["first_token_ratio"], row["agreement"]
                place = same["first_difference"]
                text += f"{ratio:<8.2f}{of_first:<10.2f}{same['equal_tokens']:.1%}"
                text += "" if place is None else f", first other one at {place + 1}"
            text += f", {row['tokens_per_step']:.1f} tokens a step" if "tokens_per_step" in row else ""
            lines.append(("", text.rstrip()))
    return "\n".join(f"{name:<11}{value}".rstrip() for name, value in lines)


def _packages(options: Options) -> list[str]:
    hf, ct2 = ("torch", "transformers"), ("ctranslate2",)
    return [*(hf if "hf" in options.vs else ()), *(ct2 if "ctranslate2" in options.vs else ())]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    try:
        options = parse(Options, list(arguments), "generate.py")
        config = configure(options)
        require_generators(options.vs)
        keep_freed_memory()
        found, parameters = generators(config, options)
        batches = [measure(found, batch, options) for batch in options.batch]
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    result = {"benchmark": "generate", "options": asdict(options), "parameters": parameters, "batches": batches}
    result["environment"] = environment()
    print(table(options, result))
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
