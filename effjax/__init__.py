"""Efficiency techniques of large language models as composable functions and Flax modules."""

__version__ = "0.1.0"
