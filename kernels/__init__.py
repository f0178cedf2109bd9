"""Kernels, a folder per operation; imported as `effjax.kernels`."""
