"""Corpora, tokenizers, preparation into shards, and the stream of batches."""
