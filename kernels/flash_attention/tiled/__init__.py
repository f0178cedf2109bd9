"""Attention in tiles in plain XLA, for every backend.

`forward.py` and `derivatives.py` have the mathematics, `steps.py` the arithmetic of one tile, and
`xla.py`, which callers import, makes them one differentiable function. Below them `tiles.py`
chooses sizes, `layout.py` takes tiles out of arrays and puts them back, and `visits.py` goes
through those that a mask shows.
"""
