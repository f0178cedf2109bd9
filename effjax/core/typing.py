"""Array types and the axis legend that every signature uses.

| axis | meaning               | axis | meaning           |
|------|-----------------------|------|-------------------|
| B    | batch                 | D    | model width       |
| T    | query length          | F    | hidden (FFN) width|
| S    | key length            | E    | experts           |
| N    | heads                 | C    | expert capacity   |
| K    | key-value heads       | V    | vocabulary        |
| H    | head width            | L    | layers            |
| R    | repeats of a scanned segment of layers                |
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Integer, Num, PRNGKeyArray, Shaped

PyTree = Any
Dim = Any  # the size of an axis: an int, or a symbol of `jax.export`
Params = Mapping[str, Any]
Key = PRNGKeyArray
if TYPE_CHECKING:  # as which `known.number` gives them back
  Size = int
  Number = float
else:
  Size = int | np.integer
  Number = int | float | np.integer | np.floating
Scalar = Number | np.ndarray | Array  # perhaps traced

__all__ = [
  "Array",
  "Bool",
  "DTypeLike",
  "Dim",
  "Float",
  "Int",
  "Integer",
  "Key",
  "Num",
  "Number",
  "Params",
  "PyTree",
  "Scalar",
  "Shaped",
  "Size",
]
