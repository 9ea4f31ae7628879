"""Weights, networks, tokenizers, templates. Knows nothing of HTTP or scheduling."""
