"""How tokens come out: sampling and cached decoding, on functions (parameters, tokens, cache) -> (logits, cache)."""
