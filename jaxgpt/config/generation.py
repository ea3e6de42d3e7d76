"""How text is made from a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxgpt.config.conversion import require

LengthRule = Literal["hf", "fairseq", "wu"]


@dataclass(frozen=True)
class GenerationConfig:
    """How text is made from a model's logits."""

    max_new_tokens: int | None = None
    """how many tokens to make at most (default: 256, or what the model's context has room for)"""
    min_new_tokens: int = 0
    """how many tokens to make before a stop token may come"""
    temperature: float = 0.8
    """divides the logits; 0 takes the most likely token"""
    top_k: int | None = None
    """sample among the k most likely tokens only"""
    top_p: float | None = None
    """sample among the most likely tokens that together have probability p (Holtzman et al. 2020)"""
    min_p: float | None = None
    """sample among the tokens at least min-p times as likely as the most likely one"""
    repetition_penalty: float = 1.0
    """divides positive logits of tokens seen before, multiplies negative ones (Keskar et al. 2019); 1 is off"""
    no_repeat_ngram: int | None = None
    """never make a sequence of n tokens that was there before"""
    samples: int = 1
    """how many texts for each prompt"""
    beams: int = 1
    """beam search with this many beams instead of sampling; the best texts are returned"""
    length_penalty: float = 1.0
    """beam search: the penalty of the length rule; a greater one makes texts longer"""
    length_rule: LengthRule = "hf"
    """beam search: what the log-probability of n tokens is divided by: n^penalty (hf, fairseq), ((5+n)/6)^penalty"""
    early_stopping: Literal["true", "false", "never"] = "false"
    """beam search: stop once there are enough texts (true), when better ones are unlikely, or impossible (never)"""
    stop: tuple[str, ...] = ()
    """end where one of these strings comes; it is not part of the text"""
    stop_tokens: tuple[int, ...] | None = None
    """end at one of these token ids (default: the model's end-of-text)"""
    lookup: int = 0
    """tokens guessed ahead from what was seen before, to make several at once; the text stays the same"""
    draft_tokens: int = 4
    """with a draft model: tokens that it guesses ahead each time"""
    truncate: Literal["never", "left"] = "never"
    """left: where prompt and text outgrow the context, drop the oldest tokens instead of refusing"""
    seed: int = 0
    """the same seed gives the same text"""

    def __post_init__(self) -> None:
        at_least = {"max_new_tokens": 1, "top_k": 1, "no_repeat_ngram": 1, "samples": 1, "beams": 1, "draft_tokens": 1}
        at_least |= {"min_new_tokens": 0, "temperature": 0, "lookup": 0}
        for name, least in at_least.items():
            value, option = getattr(self, name), name.replace("_", "-")
            # Written so that NaN is refused too.
            require(value is None or value >= least, f"{option} is {value}; it must be at least {least}")
        for name in ("top_p", "min_p"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(value is None or 0 < value <= 1, f"{option} is {value}; it must be in (0, 1]")
        penalty = self.repetition_penalty
        require(penalty > 0, f"repetition-penalty is {penalty}; it must be positive")
        in_range = abs(self.length_penalty) <= 10  # what it divides by is to be a number in float32
        require(in_range, f"length-penalty is {self.length_penalty}; it must be in [-10, 10]")
        require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must be in [0, 2**31)")
        require("" not in self.stop, "stop is an empty string, which is everywhere")
        limit = self.max_new_tokens
        require(
            limit is None or self.min_new_tokens <= limit,
            f"min-new-tokens is {self.min_new_tokens}, more than max-new-tokens {limit}",
        )
        if self.beams > 1:
            sampling = ("temperature", "top_k", "top_p", "min_p", "lookup", "draft_tokens")
            changed = [name for name in sampling if getattr(self, name) != getattr(GenerationConfig, name)]
            require(not changed, f"{(changed or [''])[0].replace('_', '-')} has no meaning with beams {self.beams}")
            require(self.samples <= self.beams, f"samples is {self.samples}, more than beams {self.beams}")
            require(self.truncate == "never", "truncate left has no meaning with beams")
