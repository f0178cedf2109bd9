"""What every room stands on: weights, trees, numerics, types. No Flax here."""

from effjax.core.weights import Weight, linear

__all__ = ["Weight", "linear"]
