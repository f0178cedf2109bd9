"""Attention by fused kernels: Pallas on NVIDIA GPUs and on TPUs, cuDNN where it can.

In this order: `steps.py`, the arithmetic of one tile; `jobs.py`, what a kernel is given;
`frame.py`, what is the same around all kernels; then a platform's own, in `gpu.py` and in `tpu.py`.
`programs.py` says which program of a GPU does what; of TPUs `walks.py` and `routes.py` say how the
grid goes through the tiles, `mosaic.py` what a program has and how it is called, and `totals.py`
sums in main memory. `places.py` says where the blocks of operands lie, `sizes.py` how large tiles
are; `folding.py` makes heads queries for decoding, which `few.py` works on; `interpreted.py` runs
kernels without their devices; `cudnn.py` asks cuDNN first. The gradients of the arrays that scores
hold, which no kernel sums, come from `tiled`.
"""
