"""The verb translate, and evaluate for translations."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxgpt.arguments import parse
from jaxgpt.cli.options import RunOptions
from jaxgpt.config import GenerationConfig, LengthRule, require

if TYPE_CHECKING:
    from jaxgpt.apps.translator import Translated, Translator


@dataclass(frozen=True)
class SearchOptions:
    """How a translation is searched for."""

    beam: int = 4
    """beams of the search; 1 takes the most likely token each time"""
    length_rule: LengthRule = "wu"
    """what the log-probability of n tokens, end token included, is divided by: ((5 + n) / 6)^p (wu), n^p (others)"""
    length_penalty: float = 0.6
    """p in that; 0 divides by nothing, more makes translations longer"""
    max_length: int | None = None
    """tokens of a translation, its end token included, at most (default: twice the source's and 10)"""
    batch_size: int = 64
    """sentences translated together"""

    def __post_init__(self) -> None:
        for name in ("beam", "batch_size", "max_length"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(value is None or value >= 1, f"{option} is {value}; it must be at least 1")

    def settings(self, best: int = 1) -> GenerationConfig:
        """The search for the `best` translations of a sentence."""
        return GenerationConfig(
            beams=self.beam, samples=best, length_rule=self.length_rule, length_penalty=self.length_penalty,
            max_new_tokens=self.max_length,
        )  # fmt: skip


@dataclass(frozen=True)
class TranslateOptions(SearchOptions, RunOptions):
    """Translate lines of text: as many lines come out as went in, in their order."""

    file: tuple[str, ...] = ()
    """the text file to translate, also without --file; - or none: standard input"""
    n_best: int = 1
    """translations of each line at most; more than 1 prints each as line number, score and text, tab-separated"""
    strict: bool = False
    """leave a line with more tokens than the model can read untranslated (an empty line, exit code 2), not cut off"""
    json: bool = False
    """print one JSON object a line: source, text, hypotheses (text and score, best first), cut (tokens not read)"""
    attention: str | None = None
    """draw what the translation of the first line looked at into this PNG file"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.file) <= 1, f"one file is translated at a time, not {len(self.file)}: {', '.join(self.file)}")
        require(self.n_best >= 1, f"n-best is {self.n_best}; it must be at least 1")
        require(self.n_best <= self.beam, f"n-best is {self.n_best}, more than beam {self.beam}")


@dataclass(frozen=True)
class EvaluateTranslationOptions(SearchOptions, RunOptions):
    """Measure how well a model translates: BLEU, chrF, and how they were computed (needs the extra 'eval')."""

    source: str = ""
    """the text file to translate"""
    reference: str = ""
    """its translations, line by line"""
    tokenize: Literal["13a", "none", "char", "intl"] = "13a"
    """how sacrebleu finds words: none for text that is tokenised already"""
    json: bool = False
    """print one JSON object instead of a table"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source and self.reference), "--source and --reference are both needed")


def _load_translator(options: RunOptions) -> Translator:
    from jaxgpt.apps.translator import Translator
    from jaxgpt.environment import keep_freed_memory

    keep_freed_memory()
    return Translator(options.model, checkpoint=options.checkpoint, dtype=options.dtype)


def translate(arguments: list[str]) -> int:
    options = parse(TranslateOptions, arguments, "jaxgpt translate", positional="--file")
    from jaxgpt.apps.heatmap import draw_attention
    from jaxgpt.apps.lines import open_lines

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as the lines that come in are, whatever the terminal's
    if options.attention is not None:
        folder = Path(options.attention).parent
        require(folder.is_dir(), f"attention is {options.attention}; there is no folder {folder}")
    lines, ready = open_lines(options.file[0] if options.file else "-")
    translator = _load_translator(options)
    settings = options.settings(options.n_best)
    results = translator.stream(lines, settings, batch_size=options.batch_size, ready=ready)
    refused = False
    for number, translated in enumerate(results, 1):
        if translated.cut:
            room, rest = translator.max_source, "it" if options.strict else "the rest of it"
            beyond = f"line {number} has {room + translated.cut} tokens, and the model can read {room}"
            print(f"jaxgpt: {beyond}; {rest} is not translated", file=sys.stderr)
        if translated.cut and options.strict:
            translated, refused = dataclasses.replace(translated, text="", hypotheses=()), True
        print(_shown(translated, number, options), flush=True)
        if number == 1 and options.attention is not None and translated.text:
            draw_attention(*translator.attention(translated.source, translated.text), options.attention)
        elif number == 1 and options.attention is not None:
            print(f"jaxgpt: line 1 has no translation to draw into {options.attention}", file=sys.stderr)
    return 2 if refused else 0


def _shown(translated: Translated, number: int, options: TranslateOptions) -> str:
    if options.json:
        return json.dumps(dataclasses.asdict(translated), ensure_ascii=False)
    if options.n_best == 1:
        return translated.text
    return (
        "\n".join(f"{number}\t{found.score:.4f}\t{found.text}" for found in translated.hypotheses) or f"{number}\t0\t"
    )


def evaluate_translation(arguments: list[str]) -> int:
    options = parse(EvaluateTranslationOptions, arguments, "jaxgpt evaluate")
    from jaxgpt.apps import translator

    result = translator.evaluate(
        _load_translator(options), options.source, options.reference, options.settings(), tokenize=options.tokenize,
        batch_size=options.batch_size,
    )  # fmt: skip
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(f"BLEU   {result.bleu:.2f}\nchrF   {result.chrf:.2f}\nexact  {result.exact_match:.4f}")
        if result.cut:
            print(f"{result.cut:,} sources have more tokens than the model can read, and were cut off")
        print(f"{result.sentences:,} sentences in {result.seconds:.1f} s, sacrebleu {result.signature}")
    return 0
