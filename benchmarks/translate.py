"""Speed of the encoder-decoder: `python benchmarks/translate.py [--size tiny] [--parts train decode] [--vs torch]`.

Training is a step of the task itself on random token ids; decoding is beam search with random weights. The peers have
the same weights, and take turns with us.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
import jax
import numpy as np
from measure import Worker, agreement, environment, in_turn, spelled
from translation_peers import Translator, marian_translator, require_torch, torch_translation_step

from jaxgpt.arguments import parse
from jaxgpt.config import (
    GenerationConfig,
    OptimizerConfig,
    ParallelConfig,
    TransformerConfig,
    TranslationConfig,
    require,
    transformer_size,
)
from jaxgpt.environment import keep_freed_memory
from jaxgpt.generation.beam import beam_search
from jaxgpt.generation.translate import translation_decoder
from jaxgpt.models.losses import smoothing_entropy
from jaxgpt.models.transformer import decoding_parameters, init_parameters
from jaxgpt.tasks.translation import loss
from jaxgpt.training.metrics import count_parameters
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import choose_layout
from jaxgpt.training.step import TrainState, train_step

SMOOTHING = TranslationConfig.label_smoothing
# Adam as in the paper. A schedule costs nothing, and without one the peer's losses are to be ours.
OPTIMIZER = OptimizerConfig(
    schedule="constant", warmup_steps=0, beta2=0.98, epsilon=1e-9, weight_decay=0.0, clip_norm=None
)
# What the losses of the first steps may differ by, relative; they do by 1e-6 or so.
CLOSE = 1e-3


@dataclass(frozen=True)
class Options:
    """Measure an encoder-decoder: training, and translating with beams."""

    size: str = "tiny"
    """tiny, base or big"""
    vocab_size: int = 10_000
    """tokens of the vocabulary"""
    parts: tuple[Literal["train", "decode"], ...] = ("train", "decode")
    """what to measure"""
    batch_size: int = 256
    """training: sentences of a batch"""
    length: int = 16
    """training: places of each source, half to all of them real, and tokens of each target"""
    dropout: float = 0.0
    """training: on both sides"""
    steps: int = 5
    """training: steps a round"""
    compile: bool = False
    """training: measure the peer through torch.compile as well"""
    sentences: int = 64
    """decoding: sentences translated together, of half to one and a half times 16 tokens"""
    new_tokens: int = 20
    """decoding: tokens of every translation"""
    beams: tuple[int, ...] = (1, 5)
    """decoding: beams, one number or several"""
    rounds: int = 5
    """rounds; in each, everyone takes a turn"""
    vs: Literal["none", "torch"] = "none"
    """measure PyTorch in the same run: torch.nn.Transformer in training, transformers' Marian model in decoding"""
    seed: int = 0
    """of the weights and the sentences"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "steps", "sentences", "new_tokens", "rounds"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(value >= 1, f"{option} is {value}; it must be at least 1")
        require(bool(self.beams) and min(self.beams) >= 1, f"beams is {self.beams}; each must be at least 1")
        require(bool(self.parts), "parts is empty; it must be train, decode or both")
        require(self.vocab_size >= 2, f"vocab-size is {self.vocab_size}; it must be at least 2")
        require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must be in [0, 2**31)")
        require(not self.compile or self.vs == "torch", "compile is of the peer; it needs --vs torch")


def configure(options: Options) -> TransformerConfig:
    """The model's shape; it must have room for the sentences."""
    config = transformer_size(options.size, vocab_size=options.vocab_size, dropout=options.dropout)
    for wanted in (options.length, options.new_tokens):
        require(wanted <= config.context, f"{wanted} tokens do not fit the context of {config.context}")
    return config


def make_batch(options: Options) -> dict[str, np.ndarray]:
    """A batch of random ids, in the form that `data.pair_batches` gives; every target counts."""
    generator, shape = np.random.default_rng([options.seed, 0]), (options.batch_size, options.length)
    end = options.vocab_size - 1
    source, targets = (generator.integers(0, end, shape, np.int32) for _ in range(2))
    targets[:, -1] = end
    return {
        "source": source,
        "source_length": generator.integers((options.length + 1) // 2, options.length + 1, len(source), np.int32),
        "target": np.concatenate([np.full((len(source), 1), end, np.int32), targets[:, :-1]], axis=1),
        "targets": targets,
        "weights": np.ones(shape, np.float32),
        "row": np.arange(len(source), dtype=np.int32),
    }


def our_step(
    config: TransformerConfig, parameters: Any, batch: dict[str, np.ndarray], seed: int
) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that runs one step of the program itself, and how it is spread over devices."""
    keep_freed_memory(config.width)
    layout = choose_layout(ParallelConfig(), len(batch["row"]), "batch-size")
    optimizer = make_optimizer(OPTIMIZER, steps=1, width=config.width)
    step = functools.partial(
        train_step, loss=functools.partial(loss, config, SMOOTHING), optimizer=optimizer, seed=seed
    )
    # A copy, because the step uses up what it is given.
    state = jax.jit(lambda p: TrainState(jax.numpy.zeros((), jax.numpy.int32), p, optimizer.init(p)))(parameters)
    state = jax.device_put(state, layout.shardings(state))
    placed, program = layout.place(batch), layout.compile(step, scalars=1, donate=True)

    def run() -> float:
        nonlocal state
        state, metrics = program(state, placed, np.float32(0))
        return float(metrics["loss"])

    return run, {"strategy": layout.strategy, "devices": len(layout.devices)}


def measure_training(options: Options) -> dict[str, Any]:
    """Target tokens a second of everyone's steps, in turn; first, that their losses are the same."""
    config = configure(options)
    parameters = jax.tree.map(np.asarray, init_parameters(config, jax.random.key(options.seed)))
    batch = make_batch(options)
    with contextlib.ExitStack() as stack:
        workers = {"ours": stack.enter_context(Worker(our_step, config, parameters, batch, options.seed))}
        if options.vs == "torch":
            made = (config, OPTIMIZER, SMOOTHING, parameters, batch)
            for name in ("torch", *(("torch.compile",) if options.compile else ())):
                workers[name] = stack.enter_context(Worker(torch_translation_step, *made, name == "torch.compile"))
        facts = workers["ours"].facts | {"parameters": count_parameters(parameters)}
        losses = {name: [worker.call() for _ in range(3)] for name, worker in workers.items()}  # compiles, too
        # Ours is a divergence, which is less by a constant.
        losses["ours"] = [value + smoothing_entropy(SMOOTHING, options.vocab_size) for value in losses["ours"]]
        for name, theirs in losses.items():
            apart = max(abs(a - b) / b for a, b in zip(losses["ours"], theirs, strict=True))
            require(options.dropout > 0 or apart < CLOSE, f"{name} is not the same model: losses {losses}")
        turns = {name: functools.partial(worker.seconds, options.steps) for name, worker in workers.items()}
        tokens = int(batch["weights"].sum()) * options.steps
        results = in_turn(turns, options.rounds, "target_tokens_per_second", tokens)
    return facts | {"losses": losses, "results": results}


def talkative(parameters: Any, seed: int) -> Any:
    """The same with a last norm of random signs.

    As it starts out, a model with one embedding for all says the last token again and again, whose agreement would
    show nothing.
    """
    decoder = parameters["decoder"]
    norm = decoder["blocks"]["mlp_norm"]
    signs = np.random.default_rng([seed, 2]).choice([-1.0, 1.0], norm["scale"].shape[-1])
    norm = norm | {"scale": norm["scale"].at[-1].multiply(signs)}
    return parameters | {"decoder": decoder | {"blocks": decoder["blocks"] | {"mlp_norm": norm}}}


def our_translator(config: TransformerConfig, parameters: Any, end: int) -> tuple[Translator, dict[str, Any]]:
    """The search behind `Translator`, with no token that ends a text."""
    keep_freed_memory()
    decoder, laid_out = translation_decoder(config, end), jax.jit(decoding_parameters)(parameters)

    def translate(sources: Sequence[Sequence[int]], beams: int, new_tokens: int) -> list[list[int]]:
        prompts, settings = [[*source, end] for source in sources], GenerationConfig(beams=beams)
        found = beam_search(decoder, laid_out, prompts, [new_tokens] * len(prompts), settings, ())
        return [list(best[0].tokens) for best in found]

    return translate, {}


def measure_decoding(options: Options) -> list[dict[str, Any]]:
    """Sentences a second of everyone's beam search, in turn; first, that they make as many tokens."""
    config, end = configure(options), options.vocab_size - 1
    generator = np.random.default_rng([options.seed, 1])
    lengths = generator.integers(8, 25, options.sentences)
    sources = [generator.integers(0, end, length).tolist() for length in lengths]
    parameters = talkative(init_parameters(config, jax.random.key(options.seed)), options.seed)
    parameters = jax.tree.map(np.asarray, parameters)
    measured = []
    with contextlib.ExitStack() as stack:
        workers = {"ours": stack.enter_context(Worker(our_translator, config, parameters, end))}
        if options.vs == "torch":
            workers["transformers"] = stack.enter_context(Worker(marian_translator, config, parameters, end))
        for beams in options.beams:
            task = (sources, beams, options.new_tokens)
            made = {name: worker.call(*task) for name, worker in workers.items()}  # compiles
            for name, texts in made.items():
                counts = sorted({len(text) for text in texts})
                alike = len(texts) == len(sources) and counts == [options.new_tokens]
                require(alike, f"{name} made {len(texts)} translations of {counts} tokens: not the same work")
            turns = {name: functools.partial(worker.seconds, 1, *task) for name, worker in workers.items()}
            results = in_turn(turns, options.rounds, "sentences_per_second", len(sources))
            for name in results.keys() - {"ours"}:
                results[name]["agreement"] = agreement(made["ours"], made[name])
            distinct = statistics.mean(len(set(text)) for text in made["ours"])
            measured.append({"beams": beams, "distinct_tokens_per_text": distinct, "results": results})
    return measured


def table(options: Options, result: dict[str, Any]) -> str:
    """The result for people."""
    about = result["environment"]
    packages = ("jax", *(("torch", "transformers") if options.vs == "torch" else ()))
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in packages)
    lines = [
        ("model", f"{options.size}, vocabulary {options.vocab_size:,}, random weights, float32"),
        ("machine", f"{about['processor']}, {about['cores']} cores; {versions}; {about['date']}"),
        ("figures", f"median (least to greatest) of {options.rounds} rounds in turn"),
        ("ratio", "ours over theirs, median of the rounds' ratios (least to greatest); above 1 is faster"),
    ]
    if "training" in result:
        trained = result["training"]
        shape = f"{options.batch_size} sentences x {options.length} random tokens, dropout {options.dropout:g}"
        lines += [("", ""), ("training", f"{trained['parameters'] / 1e6:.2f}M parameters; {shape}")]
        lines += _rows(trained["results"], "target_tokens_per_second", "target tokens/s")
    for decoded in result.get("decoding", ()):
        task = f"{options.sentences} sentences of about 16 random tokens, {options.new_tokens} new ones each"
        lines += [("", ""), (f"beam {decoded['beams']}", task)]
        lines += _rows(decoded["results"], "sentences_per_second", "sentences/s")
    return "\n".join(f"{name:<11}{value}".rstrip() for name, value in lines)


def _rows(results: Mapping[str, Mapping[str, Any]], unit: str, spelled_unit: str) -> list[tuple[str, str]]:
    head = f"{'':<21}{spelled_unit:<38}ratio"
    rows = [("", head + ("" if all("agreement" not in row for row in results.values()) else f"{'':<21}same tokens"))]
    for name, row in results.items():
        text = f"{name:<21}{spelled(row[unit]):<38}"
        if "ratio" in row:
            text += f"{spelled(row['ratio'], digits=2):<26}"
        if "agreement" in row:
            same = row["agreement"]
            text += f"{same['equal_tokens']:.1%}, {same['equal_texts']} texts whole"
        rows.append(("", text))
    return rows


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    try:
        options = parse(Options, list(arguments), "translate.py")
        configure(options)
        if options.vs == "torch":
            require_torch()
        result: dict[str, Any] = {"benchmark": "translate", "options": asdict(options)}
        if "train" in options.parts:
            result["training"] = measure_training(options)
        if "decode" in options.parts:
            result["decoding"] = measure_decoding(options)
    except ValueError as error:
        print(f"translate.py: {error}", file=sys.stderr)
        return 2
    result["environment"] = environment()
    print(table(options, result))
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
