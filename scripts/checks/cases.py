"""Random attention problems, and how far an implementation is from the same in float64.

A structure fixes what a compiled program depends on: sizes, types, masks and options. Its draws are
cases: they differ in every array, among them segment ids, positions, global tokens and blocks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention import masks
from effjax.kernels.flash_attention import gpu, reference, tpu, xla
from effjax.kernels.flash_attention.sizes import Size, Sizes
from effjax.kernels.flash_attention.tiles import Tiles

Draw = Callable[[np.random.Generator], masks.Mask]
NAMES = ("out", "lse", "d_query", "d_key", "d_value", "d_bias")
LEAST = 0.1
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}


@dataclasses.dataclass(frozen=True)
class Structure:
  """One compiled program's worth of problems.

  Attributes:
    shape: B, T, S, K, G, H, Hv.
    bias: its shape, or None.
    mask: draws a mask, of the same kind each time.
    segments, positions: whether segment ids, and positions of the queries, are given.
    tiles, sizes: those of the XLA and of the fused implementations.
  """

  shape: tuple[int, ...]
  dtype: str
  scale: float
  softcap: float | None
  bias: tuple[int, ...] | None
  mask: Draw
  segments: bool
  positions: bool
  tiles: Tiles
  sizes: Sizes

  @property
  def options(self) -> dict[str, Any]:
    return {"scale": self.scale, "logit_softcap": self.softcap}

  def draw(self, rng: np.random.Generator) -> tuple[Any, Any]:
    """Arrays (query, key, value, bias, d_out, d_lse), and who sees whom."""
    B, T, S, K, G, H, Hv = self.shape
    N = K * G
    arrays = operands(B, T, S, N, K, H, Hv, self.bias, self.dtype, rng)
    if arrays[3] is not None:
      arrays[3] = jnp.where(rng.random(arrays[3].shape) < 0.1, -jnp.inf, arrays[3])
    ids = lambda length: jnp.asarray(np.sort(rng.integers(-1, 3, (B, length)), axis=1), jnp.int32)
    where = {
      "mask": self.mask(rng),
      "segment_ids": (ids(T), ids(S)) if self.segments else None,
      "query_positions": (
        jnp.asarray(rng.integers(0, S, (B, T)), jnp.int32) if self.positions else None
      ),
    }
    return arrays, where


def operands(B, T, S, N, K, H, Hv, bias=None, dtype="float32", rng=0) -> list[Any]:
  """Random query, key, value, bias of the shape `bias`, and cotangents of out and lse."""
  shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, Hv), bias, (B, T, N, Hv), (B, T, N)]
  rng = np.random.default_rng(rng)
  return [None if s is None else jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def structure(rng: np.random.Generator) -> Structure:
  """A random one."""
  pick = lambda *options: options[rng.integers(len(options))]
  B, K, G = (int(rng.integers(1, n + 1)) for n in (2, 2, 3))
  S = int(rng.integers(1, 70))
  T = pick(S, int(rng.integers(1, S + 1)), int(rng.integers(1, 70)))
  positions = bool(rng.random() < 0.15)
  whole = (B, K * G, T, S)
  side = lambda: pick(16, 32, 64)
  size = lambda: Size(side(), side())
  divisor = lambda n: pick(*(d for d in range(1, n + 1) if n % d == 0))
  heads = divisor(K)
  return Structure(
    shape=(B, T, S, K, G, pick(4, 8, 16, 24), pick(4, 8, 16)),
    dtype=pick("float32", "float32", "bfloat16", "float16"),
    scale=pick(0.25, 0.4),
    softcap=pick(None, None, 1.5, 20.0),
    bias=None if rng.random() < 0.5 else tuple(pick(1, n) for n in whole),
    mask=_mask(rng, whole, positions, depth=2),
    segments=bool(rng.random() < 0.3),
    positions=positions,
    tiles=Tiles(
      divisor(B) if heads == K else 1, heads, pick(8, 16, 32), pick(8, 16, 32), pick(False, True)
    ),
    sizes=Sizes(size(), size(), size()),
  )


def _mask(rng: np.random.Generator, whole: tuple[int, ...], positions: bool, depth: int) -> Draw:
  """A mask of one kind, or two of them joined."""
  inner = lambda: _mask(rng, whole, positions, depth - 1)
  kind = rng.integers(5) if depth else 0
  if kind < 2:
    leaves = _leaves(rng, whole, positions)
    return leaves[rng.integers(len(leaves))]
  if kind == 2:
    negated = inner()
    return lambda r: ~negated(r)
  first, second = inner(), inner()
  return (lambda r: first(r) & second(r)) if kind == 3 else (lambda r: first(r) | second(r))


def _leaves(rng: np.random.Generator, whole: tuple[int, ...], positions: bool) -> list[Draw]:
  """One draw for each kind of mask that goes with the sizes."""
  B, N, T, S = whole
  number = lambda least, most: int(rng.integers(least, most + 1))
  window = masks.SlidingWindow(number(0, 40), number(0, 20))
  dilated = masks.Dilated(number(1, 6), number(2, 5))
  block = number(1, 20)
  fixed = (
    masks.Full(),
    masks.Causal(),
    window,
    dilated,
    masks.BlockWindow(number(0, 2), number(0, 2), block),
    masks.Global(number(0, min(S, 5))),
    masks.Global(tuple(number(0, S - 1) for _ in range(2))),
    masks.Prefix(number(0, S)),
    masks.Predicate(lambda q, k: (q * 3 + k) % 5 != 0),
    masks.PerHead((window, dilated), tuple(number(0, 1) for _ in range(N))),
  )
  draws: list[Draw] = [lambda r, mask=mask: mask for mask in fixed]
  draws.append(lambda r: masks.Prefix(jnp.asarray(r.integers(0, S + 1, B), jnp.int32)))
  if T <= S:
    blocks, heads, per_row = -(-S // block), (1, N)[number(0, 1)], number(1, 2)
    table = lambda r: jnp.asarray(r.integers(-1, blocks, (1, heads, blocks, per_row)), jnp.int32)
    draws.append(lambda r: masks.RandomBlocks(table(r), block))
    draws.append(lambda r: masks.Global(jnp.asarray(r.integers(-1, S, (B, 2)), jnp.int32)))
    ids = lambda r: jnp.asarray(np.sort(r.integers(-1, 4, (B, S)), axis=1), jnp.int32)
    draws.append(lambda r: masks.Documents(ids(r)))
  return draws


def evaluate(attention: Callable, arrays: Any, where: Any) -> tuple[Any, ...]:
  """out, lse and the gradients of query, key, value and bias."""
  *inputs, d_out, d_lse = arrays
  (out, lse), backward = jax.vjp(lambda q, k, v, b: attention(q, k, v, bias=b, **where), *inputs)
  d_lse = jnp.where(jnp.isfinite(lse), d_lse.astype(lse.dtype), 0)
  return out, lse, *jax.tree.leaves(backward((d_out.astype(out.dtype), d_lse)))


def programs(
  problem: Structure, platforms: tuple[str, ...], interpret: bool
) -> dict[str, Callable]:
  """A compiled `evaluate` for each of the platforms "xla", "gpu", "tpu"."""
  options = problem.options
  fused = {"sizes": problem.sizes, "interpret": interpret}
  attention = {
    "xla": functools.partial(xla.attention, tiles=problem.tiles, **options),
    "gpu": functools.partial(gpu.attention, **fused, **options),
    "tpu": functools.partial(tpu.attention, **fused, **options),
  }
  return {name: jax.jit(functools.partial(evaluate, attention[name])) for name in platforms}


def exact(**options: Any) -> Callable:
  """`evaluate` of attention written out, with these options, in float64."""
  run = jax.jit(functools.partial(evaluate, functools.partial(reference.attention, **options)))

  def wide(arrays, where):
    with jax.enable_x64(True):
      arrays = [None if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
      return jax.tree.map(np.asarray, run(arrays, where))

  return wide


def errors(got: tuple[Any, ...], want: tuple[Any, ...]) -> dict[str, float]:
  """‖got − want‖ / ‖want‖ of each result; infinite where one of the two alone is not finite.

  The elements of `want` count as at least `LEAST` on average, for gradients that cancel to nothing;
  those of a bias shared along keys, which sum what all its queries' log-sum-exps ask for, as at
  least what so many terms of `LEAST` add up to by chance.
  """
  found = {}
  for name, x, y in zip(NAMES, got, want, strict=False):
    x, finite = np.asarray(x, np.float64), np.isfinite(y)
    if (np.isfinite(x) != finite).any() or (x[~finite] != y[~finite]).any():
      found[name] = np.inf
      continue
    terms = np.size(want[1]) / y.size if name == "d_bias" and y.shape[3] == 1 else 1.0
    x, y = x[finite], y[finite]
    size = max(np.linalg.norm(y), LEAST * (x.size * terms) ** 0.5)
    found[name] = float(np.linalg.norm(x - y) / size) if x.size else 0.0
  return found
