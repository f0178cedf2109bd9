"""Where the factors of LoRA start, and over which base.

A start is a function (path, W, key, rank, scale) → (W0, A, B) of a matrix W [..., D, F] or a
`Weight`: what stands under the factors, and the factors.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import numerics
from effjax.core.known import known, number
from effjax.core.trees import is_table
from effjax.core.typing import Array, Float, Key, Scalar, Size
from effjax.core.weights import Weight, is_weight, materialize

Factors = tuple[Any, Array, Array]
Start = Callable[[str, Any, Key, Size, Scalar], Factors]
Represent = Callable[[str, Array], Weight]


def default(path: str, w: Any, key: Key, rank: Size, scale: Scalar) -> Factors:
  """W itself, one factor random and the other 0, as in Hugging Face's peft.

  Of a matrix A ~ U(−1/√D, 1/√D) and B = 0; of a table, named "embedding", A = 0 and B ~ N(0, 1).

  Example:
    >>> _, a, b = default("kernel", jnp.ones((4, 3)), jax.random.key(0), 2, 1.0)
    >>> bool((abs(a) <= 0.5).all()), b.tolist()
    (True, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
  """
  *batch, D, F = w.shape
  of_a, of_b = (*batch, D, rank), (*batch, rank, F)
  if is_table(path):
    return w, jnp.zeros(of_a, jnp.float32), jax.random.normal(key, of_b, jnp.float32)
  bound = 1 / math.sqrt(D)
  a = jax.random.uniform(key, of_a, jnp.float32, -bound, bound)
  return w, a, jnp.zeros(of_b, jnp.float32)


def check_represent(represent: Any) -> None:
  """Raises ValueError for what is no function, such as `NF4` in place of `NF4.represent`."""
  if represent is not None and (not callable(represent) or isinstance(represent, type)):
    allowed = "a function of path and matrix, as NF4.represent"
    raise ValueError(f"represent={represent!r}; allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class PiSSA:
  """s·A B = U_r S_r V_rᵀ, the principal part of W = U S Vᵀ, and W0 = W − s·A B (arXiv 2404.02948).

  A = U_r √(S_r/s) and B = √(S_r/s) V_rᵀ. Nothing is drawn at random.

  Attributes:
    represent: (path, W0) → what stands for W0, as `NF4.represent`; None leaves it an array.

  Example:
    >>> w = jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> base, a, b = PiSSA()("kernel", w, jax.random.key(0), 1, 1.0)
    >>> abs(base).tolist(), abs(a @ b).tolist()
    ([[0.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 0.0]])
  """

  represent: Represent | None = None

  def __post_init__(self):
    check_represent(self.represent)

  def __call__(self, path: str, w: Any, key: Key, rank: Size, scale: Scalar) -> Factors:
    _check("PiSSA", w, scale)
    a, b = principal(w, rank, scale)
    base = _less(w, a, b, scale)
    return base if self.represent is None else self.represent(path, base), a, b


@dataclasses.dataclass(frozen=True)
class LoftQ:
  """W0 + s·A B ≈ W with W0 quantised, by turns: W0 = q(W − s·A B), s·A B = SVD_r(W − W0).

  Li et al., arXiv 2310.08659, algorithm 1; A B = 0 before. Nothing is drawn at random.

  Attributes:
    represent: (path, matrix) → q(matrix), a quantised `Weight`, as `NF4.represent`.
    steps: turns.

  Raises:
    ValueError: for steps that are no integer from 1, and for a `represent` that is no function.

  Example:
    >>> from effjax.quant import Int4
    >>> w = jax.random.normal(jax.random.key(0), (64, 8))
    >>> base, a, b = LoftQ(Int4.represent, steps=2)("kernel", w, jax.random.key(0), 4, 2.0)
    >>> error = lambda matrix: float(jnp.linalg.norm(w - matrix))
    >>> error(base.materialize() + 2 * a @ b) < error(Int4.quantize(w).materialize())
    True
  """

  represent: Represent
  steps: Size = 1

  def __post_init__(self):
    check_represent(self.represent)
    number("steps", self.steps, of="LoftQ", integer=True, least=1)

  def __call__(self, path: str, w: Any, key: Key, rank: Size, scale: Scalar) -> Factors:
    _check("LoftQ", w, scale)
    left = w
    for _ in range(self.steps):
      base = self.represent(path, left)
      a, b = principal(_wide(w) - _wide(materialize(base)), rank, scale)
      left = _less(w, a, b, scale)
    return base, a, b


STARTS: dict[str, Start] = {"default": default, "pissa": PiSSA()}


def start_of(start: str | Start) -> Start:
  """The function that is meant by one of `STARTS`, or the one given.

  Raises:
    ValueError: for another name, and for a class, such as `PiSSA` in place of `PiSSA()`.
  """
  if callable(start) and not isinstance(start, type):
    return start
  if not isinstance(start, str) or start not in STARTS:
    ours = f"{', '.join(STARTS)}, PiSSA(represent), LoftQ(represent)"
    raise ValueError(f"start={start!r}; allowed: {ours}, or a function as lora.starts says")
  return STARTS[start]


def principal(w: Float[Array, "... D F"], rank: Size, scale: Scalar) -> tuple[Array, Array]:
  """A and B of s·A B = the nearest matrix of that rank to w, the singular values shared alike."""
  u, s, vt = jnp.linalg.svd(_wide(w), full_matrices=False)
  root = jnp.sqrt(s[..., :rank] / jnp.abs(scale))
  a, b = u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]
  return a.astype(jnp.float32), (jnp.sign(scale) * b).astype(jnp.float32)


def _less(w: Array, a: Array, b: Array, scale: Scalar) -> Array:
  """W − s·A B in the type of W."""
  product = jnp.matmul(a * scale, b, precision=jax.lax.Precision.HIGHEST)
  return (_wide(w) - product).astype(w.dtype)


def _wide(w: Array) -> Array:
  return jnp.asarray(w).astype(numerics.wide(w.dtype))


def _check(start: str, w: Any, scale: Scalar) -> None:
  if is_weight(w):
    raise ValueError(
      f"{start} over {w!r}; allowed: a plain matrix, what is left of which {start}(represent) "
      "quantises"
    )
  if (values := known(scale)) is not None and not values.all():
    raise ValueError(f"alpha 0 with {start}; allowed: any other, by which it divides")
