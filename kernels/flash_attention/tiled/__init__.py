"""Attention in tiles in plain XLA, for every backend."""
