"""Named, complete configs. Each docstring states what it is, its command, and the result that was measured.

Where and when it was measured stands in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from jaxgpt.config import (
    ChatConfig,
    ConversationsConfig,
    DataConfig,
    ExamplesConfig,
    FinetuneConfig,
    GPTConfig,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    TranslationConfig,
    gpt_size,
    suggestion,
    transformer_size,
)


def default() -> TrainConfig:
    """A GPT that writes Python, from the source of the Python standard library on this machine.

    python train.py
    Measured: 1.78 bits a byte held out (3.85 nats a token) in 4 minutes on 2 cores.
    """
    return TrainConfig(
        model=GPTConfig(context=128, layers=4, heads=3, width=192, bias=False),
        data=DataConfig(tokenizer="bpe", vocab_size=2048, held_out=0.05, batch_size=16),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=6e-3,
            muon_learning_rate=0.03,
            final_learning_rate=0.0,
            warmup_steps=50,
            weight_decay=0.05,
        ),
        steps=600,
        eval_interval=150,
        sample_prompt="import os\n\n\nclass ",
    )


def shakespeare_char_cpu() -> TrainConfig:
    """Shakespeare character by character on a CPU: nanoGPT's recipe for a laptop, flag for flag.

    python train.py shakespeare-char-cpu --data.path tinyshakespeare.txt
    Measured: held-out loss 1.899 nats a character (mean of 3 seeds; nanoGPT 1.886 on a sample), 2.5 minutes on 2 cores.
    """
    return TrainConfig(
        model=gpt_size("tiny", dropout=0.0, bias=False),
        data=DataConfig(tokenizer="character", batch_size=12),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            final_learning_rate=1e-4,
            warmup_steps=100,
            beta2=0.99,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        steps=2000,
        eval_interval=250,
    )


def shakespeare_fast() -> TrainConfig:
    """Shakespeare character by character on a CPU, to a held-out loss of 1.88 as soon as possible.

    python train.py shakespeare-fast --data.path tinyshakespeare.txt
    Measured: held-out loss 1.862 nats a character (mean of 3 seeds) after 230 steps, 18 s on 2 cores, compiled anew.
    """
    small = shakespeare_char_cpu()
    return replace(
        small,
        model=GPTConfig(
            context=64,
            layers=2,
            heads=2,
            width=128,
            hidden=344,
            dropout=0.0,
            bias=False,
            positions="rotary",
            normalizer="rms",
            qk_norm=True,
            activation="swiglu",
            zero_init=True,
            tied_head=False,
        ),
        data=replace(small.data, batch_size=16),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.016,
            muon_learning_rate=0.03,
            muon_beta=0.8,
            final_learning_rate=0.0,
            schedule="linear",
            warmup_steps=10,
            beta2=0.95,
            weight_decay=0.0,
            clip_norm=None,
        ),
        steps=230,
        eval_interval=230,
    )


def shakespeare_char() -> TrainConfig:
    """Shakespeare character by character on one GPU: nanoGPT's recipe, flag for flag.

    python train.py shakespeare-char --data.path tinyshakespeare.txt
    Not measured to the end: it needs an accelerator. nanoGPT reports 1.4697.
    """
    small = shakespeare_char_cpu()
    return replace(
        small,
        model=GPTConfig(context=256, layers=6, heads=6, width=384, dropout=0.2, bias=False),
        data=replace(small.data, batch_size=64),
        steps=5000,
    )


def gpt2() -> TrainConfig:
    """GPT-2 124M at nanoGPT's OpenWebText settings: 600,000 steps of 491,520 tokens.

    python train.py gpt2 --data.path openwebtext/
    Not measured to the end: it needs accelerators. nanoGPT reports about 2.85.
    """
    return TrainConfig(
        model=_gpt2_model("124M"),
        data=DataConfig(tokenizer="bpe", vocab_size=50257, held_out=0.0005, batch_size=480),
        optimizer=OptimizerConfig(
            learning_rate=6e-4, final_learning_rate=6e-5, warmup_steps=2000, beta2=0.95, weight_decay=0.1
        ),
        parallel=ParallelConfig(gradient_accumulation=5),
        steps=600_000,
        eval_interval=1000,
    )


def gpt2_medium() -> TrainConfig:
    """GPT-2 355M; otherwise as gpt2.

    python train.py gpt2-medium --data.path openwebtext/
    """
    return replace(gpt2(), model=_gpt2_model("355M"))


def gpt2_large() -> TrainConfig:
    """GPT-2 774M; otherwise as gpt2.

    python train.py gpt2-large --data.path openwebtext/
    """
    return replace(gpt2(), model=_gpt2_model("774M"))


def gpt2_xl() -> TrainConfig:
    """GPT-2 1558M; otherwise as gpt2.

    python train.py gpt2-xl --data.path openwebtext/
    """
    return replace(gpt2(), model=_gpt2_model("1558M"))


def translate() -> TranslationConfig:
    """A translator of English number and date phrases into German, which are made by rule: nothing is downloaded.

    python train.py translate
    All of 1,000 held-out phrases exactly right after 1,000 steps, 4 minutes on 2 cores.
    """
    return TranslationConfig(
        model=transformer_size("tiny", context=64, dropout=0.1),
        data=PairsConfig(vocab_size=600, batch_tokens=1024, buckets=4),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, final_learning_rate=0.0, beta2=0.98, epsilon=1e-9, weight_decay=0.0
        ),
        steps=1000,
        eval_interval=200,
    )


def finetune() -> FinetuneConfig:
    """Fine-tune a pretrained GPT with a task head, at the first GPT's settings (Radford et al. 2018, section 4.1).

    python train.py finetune --task classification --init-from BASE --data.path train.tsv --data.validation dev.tsv
    Without --init-from it is finetune-from-scratch. SST-2, from a GPT of 2.9M parameters: 82.8 % on dev (3 seeds).
    """
    return FinetuneConfig(
        model=GPTConfig(dropout=0.1),
        optimizer=OptimizerConfig(
            learning_rate=6.25e-5,
            final_learning_rate=0.0,
            schedule="linear",
            warmup_share=0.002,
            beta2=0.999,
            weight_decay=0.01,
        ),
    )


def finetune_from_scratch() -> FinetuneConfig:
    """The same where there is no pretrained model: a small GPT, higher learning rate and dropout, more epochs.

    python train.py finetune-from-scratch --task classification --data.path train.tsv --data.validation dev.tsv
    SST-2: 77.8 % on dev (mean of 3 seeds), 2 minutes on 2 cores.
    """
    tuned = finetune()
    return replace(
        tuned,
        model=GPTConfig(context=256, layers=2, heads=4, width=128, dropout=0.3),
        optimizer=replace(tuned.optimizer, learning_rate=1e-3, warmup_share=0.1, weight_decay=0.1),
        epochs=4.0,
        lm_weight=0.5,
        head_dropout=0.3,
        select="accuracy",
    )


def sentiment() -> FinetuneConfig:
    """Whether a review is positive or negative; without --data.path of reviews that are made by rule.

    python train.py sentiment
    All of 500 held-out reviews rightly labelled after 504 steps, 80 seconds on 2 cores.
    """
    return replace(
        finetune_from_scratch(),
        model=GPTConfig(context=64, layers=2, heads=4, width=128, dropout=0.1),
        data=ExamplesConfig(vocab_size=600, buckets=2),
    )


def chat() -> ChatConfig:
    """A chatbot; without --data.path from small talk that is made by rule, without --init-from from scratch.

    python train.py chat
    192 of 200 held-out answers to the letter after 528 steps, 3 minutes on 2 cores.
    """
    return ChatConfig(
        model=GPTConfig(context=256, layers=3, heads=4, width=128, dropout=0.0),
        data=ConversationsConfig(vocab_size=600),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=3e-3,
            muon_learning_rate=0.02,
            final_learning_rate=0.0,
            schedule="linear",
            warmup_share=0.05,
            weight_decay=0.01,
        ),
        epochs=8.0,
        evaluations=0.5,
    )


def multi30k_tiny() -> TranslationConfig:
    """Image captions, English to German, with the small model of Wu et al. 2021 (Transformer-Tiny).

    python train.py multi30k-tiny --data.path train.en train.de --data.validation val.en val.de
    BLEU 40.3 on test2016 (published: 41.0, from batches twice as large), 8,000 steps, 103 minutes on 2 cores.
    """
    return TranslationConfig(
        model=transformer_size("tiny", context=128, dropout=0.3),
        data=PairsConfig(vocab_size=10_000, batch_tokens=4096),
        optimizer=OptimizerConfig(
            learning_rate=5e-3,
            schedule="inverse-sqrt",
            warmup_steps=1000,
            beta2=0.98,
            epsilon=1e-9,
            weight_decay=0.0,
            clip_norm=None,
        ),
        steps=8000,
        eval_interval=250,
        checkpoint_interval=125,
        average=10,
    )


def _gpt2_model(size: str) -> GPTConfig:
    """As nanoGPT trains it: no biases, and 50,257 tokens padded to a multiple of 64."""
    return gpt_size(size, vocab_size=50304, bias=False, compute_dtype="bfloat16")


RECIPES: dict[str, Callable[[], RunConfig]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        default,
        shakespeare_char_cpu,
        shakespeare_fast,
        shakespeare_char,
        gpt2,
        gpt2_medium,
        gpt2_large,
        gpt2_xl,
        translate,
        multi30k_tiny,
        chat,
        finetune,
        finetune_from_scratch,
        sentiment,
    )
}


def recipe(name: str) -> RunConfig:
    """Return the recipe of that name, as in `python train.py NAME`.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name}{suggestion(name, RECIPES)}")
    return RECIPES[name]()


def describe() -> str:
    """All recipes with what they do, their commands and their measured results, for `--help`."""
    return "\n".join(
        f"  {name}\n" + "\n".join(f"      {line}".rstrip() for line in inspect.getdoc(function).splitlines() if line)  # type: ignore[union-attr]
        for name, function in RECIPES.items()
    )
