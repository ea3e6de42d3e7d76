"""Text to arrays: tokenizers, corpora, token shards, batches. NumPy only; JAX is never imported here."""
