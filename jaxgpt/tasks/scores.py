"""How near translations come to references: BLEU over words as they are spaced, and exact match."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4  # the longest n-grams that count


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU in percent, one reference each (Papineni et al. 2002): no tokenisation but at white space.

    What `sacrebleu --tokenize none` computes: an order of n-grams without a match counts as half a match, then a
    quarter and so on (exponential smoothing).
    """
    matches, totals = [0] * ORDER, [0] * ORDER
    ours = theirs = 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        words, wanted = hypothesis.split(), reference.split()
        ours, theirs = ours + len(words), theirs + len(wanted)
        for order in range(ORDER):
            grams = _ngrams(words, order + 1)
            matches[order] += (grams & _ngrams(wanted, order + 1)).total()
            totals[order] += grams.total()
    if not matches[0] or not all(totals):
        return 0.0
    logs, halving = [], 1.0
    for match, total in zip(matches, totals, strict=True):
        halving = halving if match else 2 * halving
        logs.append(math.log((match or 1 / halving) / total))
    brevity = min(0.0, 1.0 - theirs / ours)
    return 100.0 * math.exp(brevity + sum(logs) / ORDER)


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of the hypotheses that are their reference, but for spacing."""
    pairs = zip(hypotheses, references, strict=True)
    return sum(hypothesis.split() == reference.split() for hypothesis, reference in pairs) / max(1, len(references))


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
