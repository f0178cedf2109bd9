"""Exact attention that never holds the T × S matrix of scores.

To read first: `reference.py`, the operation written out (with `shown.py`, its products), and
`algorithm1.py`, FlashAttention as its paper has it, in numpy. Then `tile_map`, which tiles of
scores a mask shows and what is added to them. On it stand two implementations: `tiled`, in plain
XLA for every backend, and `fused`, kernels for GPUs and TPUs, which leave the gradients of what
scores hold to `tiled`. `row_bias.py` keeps a bias shared along the keys out of both; `cases.py`
draws the problems that tests and checks put to all of them.
"""
