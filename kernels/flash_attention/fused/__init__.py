"""Attention by fused kernels: Pallas on NVIDIA GPUs and on TPUs, cuDNN where it can.

In this order: `steps.py`, the arithmetic of one tile; `jobs.py`, what a kernel is given;
`frame.py`, what is the same around all kernels; then a platform's four, in `gpu.py`, or in `tpu.py`
with `walks.py`, the tiles as a TPU's grid goes through them. `programs.py` says which program of a
GPU does what, `places.py` where the blocks of operands lie, `sizes.py` how large tiles are;
`folding.py` makes heads queries for decoding, for which `few.py` is; `interpreted.py` runs kernels
without their devices; `cudnn.py` asks cuDNN first. The gradients of the arrays that scores hold,
which no kernel sums, come from `tiled`.
"""
