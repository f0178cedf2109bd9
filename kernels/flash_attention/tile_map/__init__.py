"""What a mask shows, in tiles of queries and keys.

In this order: `spans.py`, sets of tiles as intervals; `sight.py`, a mask with segments and
positions as arrays to cut into tiles and a predicate on one; `terms.py`, what is added to scores in
the same form; `blocks.py`, the tiles to visit as lists by rows and by columns, for kernels that
walk along them; `partly.py`, what of all this is part of the program.
"""
