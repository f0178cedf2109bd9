"""Dispatch: which row of the experts' computation each choice of a token becomes, and back.

Rows lie either sorted by expert, one after another, so that no token is dropped whatever the
experts' loads (MegaBlocks, Gale et al., arXiv 2211.15841, section 5); or in C slots for each
expert, where the router has promised that none has more (GShard, Lepikhin et al., arXiv 2006.16668,
section 3.2, without its [T, E, C] arrays). Both compute the same, and both directions of both are
gathers, in the backward pass too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effjax.core import spmd
from effjax.core.known import is_id
from effjax.core.numerics import nan_unless, wide, zero_unless
from effjax.core.typing import Array, Bool, Dim, Float, Int, Size
from effjax.kernels.grouped_matmul import Groups
from effjax.moe import exchange

SLOTS = 2  # slots are computed where there are at most so many for each choice


class Plan(NamedTuple):
  """Where the choices of M tokens, k each, lie among R rows.

  Attributes:
    choice: [R], the choice m·k + i that lies in a row; M·k in a row where none does.
    row: [M, k], the row of each choice; R for one that has none.
    sizes: [1, E], rows of each expert.
  """

  choice: Int[Array, "R"]
  row: Int[Array, "M k"]
  sizes: Int[Array, "1 E"]
