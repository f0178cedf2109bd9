"""Attention by fused kernels: Triton, Mosaic, cuDNN."""
