"""Attention problems, and how far an implementation is from the same in float64.

A structure fixes what a compiled program depends on: sizes, types, masks and options. Its draws are
cases: they differ in every array, among them segment ids, positions, global tokens and blocks.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from effjax.core import spmd
from effjax.kernels.flash_attention import reference
from effjax.kernels.flash_attention.fused import gpu, tpu
from effjax.kernels.flash_attention.fused.sizes import Sizes
from effjax.kernels.flash_attention.tiled import xla
from effjax.kernels.flash_attention.tiled.tiles import Tiles

Draw = Callable[[np.random.Generator], Any]
NAMES = ("out", "lse", "d_query", "d_key", "d_value", "d_bias")
LEAST = 0.1
SIGNS = 8
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
    scores: draws what is added to the scores, of the same kind each time, or None.
    learned_cap: whether the soft cap is data, which trains.
    cache: whether keys are slots of which some were never written and hold NaN.
    mode: what computes: "plain", "x64", where JAX has 64 bits and integers take them, or "mesh",
      where arrays lie on one whose axis is explicit.
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
  scores: Draw | None = None
  learned_cap: bool = False
  cache: bool = False
  mode: str = "plain"

  @property
  def options(self) -> dict[str, Any]:
    softcap = None if self.learned_cap else self.softcap
    return {"scale": self.scale, "logit_softcap": softcap}

  def draw(self, rng: np.random.Generator) -> tuple[Any, Any]:
    """Arrays (query, key, value, bias, d_out, d_lse), and who sees whom."""
    B, T, S, K, G, H, Hv = self.shape
    N = K * G
    arrays = operands(B, T, S, N, K, H, Hv, self.bias, self.dtype, rng)
    if arrays[3] is not None:
      hidden = rng.random(arrays[3].shape) < 0.1
      arrays[3] = np.where(hidden, -np.inf, arrays[3]).astype(self.dtype)
    integers = lambda low, high, length: rng.integers(low, high, (B, length)).astype(np.int32)
    ids = lambda length: np.sort(integers(-1, 3, length), axis=1)
    where = {
      "mask": self.mask(rng),
      "segment_ids": (ids(T), ids(S)) if self.segments else None,
      "query_positions": integers(0, S, T) if self.positions else None,
    }
    if self.cache:
      written = rng.random((B, S)) < 0.7
      arrays[1], arrays[2] = (np.where(written[..., None, None], x, np.nan) for x in arrays[1:3])
      arrays[1:3] = (x.astype(self.dtype) for x in arrays[1:3])
      where["segment_ids"] = np.zeros((B, T), np.int32), written.astype(np.int32) - 1
    if self.scores is not None:
      where["scores"] = self.scores(rng)
    if self.learned_cap:
      where["logit_softcap"] = np.float32(self.softcap)
    return jax.device_put((arrays, where))


def operands(B, T, S, N, K, H, Hv, bias=None, dtype="float32", rng=0) -> list[Any]:
  """Random query, key, value, bias of the shape `bias`, and cotangents of out and lse."""
  shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, Hv), bias, (B, T, N, Hv), (B, T, N)]
  rng = np.random.default_rng(rng)
  return [None if s is None else jax.device_put(rng.normal(size=s).astype(dtype)) for s in shapes]


def evaluate(attention: Callable, arrays: Any, where: Any) -> tuple[Any, ...]:
  """out, lse and the gradients of query, key, value and bias, and of the floats in `where`."""
  *inputs, d_out, d_lse = arrays
  learned, others = _floats(where), _floats(where, others=True)

  def run(query, key, value, bias, learned):
    given = jax.tree.map(lambda x, y: y if x is None else x, learned, others, is_leaf=_missing)
    return attention(query, key, value, bias=bias, **given)

  (out, lse), backward = jax.vjp(run, *inputs, learned)
  d_lse = jnp.where(jnp.isfinite(lse), d_lse.astype(lse.dtype), 0)
  *gradients, more = backward((d_out.astype(out.dtype), d_lse))
  more = jax.tree.leaves(more)
  kept = gradients if more else jax.tree.leaves(gradients)
  return out, lse, *kept, *more


def _floats(where: Any, others: bool = False) -> Any:
  """`where` with None for all that does not train, or for all that does."""
  trains = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
  return jax.tree.map(lambda x: x if trains(x) is not others else None, where)


def _missing(x: Any) -> bool:
  return x is None


def programs(
  problem: Structure, platforms: tuple[str, ...], interpret: bool
) -> dict[str, Callable]:
  """A compiled `evaluate` for each of the platforms "xla", "gpu", "tpu", in the problem's mode."""
  options = problem.options
  fused = {"sizes": problem.sizes, "interpret": interpret}
  attention = {
    "xla": functools.partial(xla.attention, tiles=problem.tiles, **options),
    "gpu": functools.partial(gpu.attention, **fused, **options),
    "tpu": functools.partial(tpu.attention, **fused, **options),
  }
  return {name: _in_mode(problem.mode, attention[name]) for name in platforms}


def _in_mode(mode: str, attention: Callable) -> Callable:
  """`evaluate` of arrays and where, compiled."""
  run = jax.jit(functools.partial(evaluate, spmd.on_any_mesh(attention)))
  if mode == "x64":
    wide = lambda x: np.asarray(x, np.int64 if x.dtype == np.int32 else x.dtype)

    def run_wide(arrays, where):
      with jax.enable_x64(True):
        return run(arrays, jax.tree.map(wide, where))

    return run_wide
  if mode == "mesh":
    place = NamedSharding(jax.make_mesh((1,), ("batch",)), PartitionSpec("batch"))
    return lambda arrays, where: run(jax.device_put(arrays, place), where)
  return run


@functools.cache
def exact(**options: Any) -> Callable:
  """`evaluate` of attention written out, with these options, in float64."""
  run = jax.jit(functools.partial(evaluate, functools.partial(reference.attention, **options)))

  def wide(arrays, where):
    with jax.enable_x64(True):
      double = lambda x: np.asarray(
        x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None
      )
      arrays, where = jax.device_put(jax.tree.map(double, (arrays, where)))
      return jax.tree.map(np.asarray, run(arrays, where))

  return wide


def chance(problem: Structure) -> Callable[[Any, Any, Any], dict[str, float]]:
  """Gives what the terms of the gradients of scores' arrays, a bias and a cap add up to by chance.

  A pair's score has the gradient P (dO·V − dO·O + d_lse), whose terms may cancel: with one key only
  d_lse is left, and the rounding of the others. Here each of them, and each product in them, has a
  random sign, so that none cancel, and the Jacobian of the scores by their arrays takes the pairs'
  gradients to these; a cap's is at most 1 a pair. The root mean square of `SIGNS` draws.
  """
  B, T, S, K, G, *_ = problem.shape
  row = lambda x: jnp.moveaxis(x.reshape(B, T, K, G, -1), 1, 3)

  def weights(arrays, where):
    """P, the gradient of the sum of all log-sum-exps by what is added to the scores."""
    query, key, value, bias, *_ = (None if x is None else x.astype(jnp.float32) for x in arrays)

    def total(added):
      whole = added if bias is None else bias + added
      run = functools.partial(reference.attention, query, key, value, bias=whole)
      lse = run(**(problem.options | where))[1]
      return jnp.where(jnp.isfinite(lse), lse, 0).sum()

    return jax.grad(total)(jnp.zeros((B, K * G, T, S))).reshape(B, K, G, T, S)

  def pairs(arrays, where, out, key):
    """The gradients [B, N, T, S] of the scores, with random signs."""
    keys = iter(jax.random.split(key, 4))
    signed = lambda x: x * jax.random.rademacher(next(keys), x.shape, jnp.float32)
    _, _, value, _, d_out, d_lse = arrays
    value = jnp.where(jnp.isfinite(value), value, 0)
    products = jnp.einsum("bkgth,bskh->bkgts", signed(row(d_out)), value)
    rows = signed(row(d_out * out)).sum(-1, keepdims=True) + signed(row(d_lse))
    return (weights(arrays, where) * (signed(products) + rows)).reshape(B, K * G, T, S)

  @jax.jit
  def squares(arrays, where, out, key):
    of_pairs = pairs(arrays, where, out, key)

    def added(bias, scores):
      total = jnp.zeros_like(of_pairs)
      if scores is not None:
        total += scores.dense(T, S, where["query_positions"])
      return total if bias is None else total + bias

    bias = None if arrays[3] is None else arrays[3].astype(jnp.float32)
    of_bias, of_scores = jax.vjp(added, bias, where.get("scores"))[1](of_pairs)
    learned = [of_pairs] * problem.learned_cap + jax.tree.leaves(of_scores)
    named = {"d_bias": of_bias} | {f"d_scores_{n}": x for n, x in enumerate(learned)}
    return {name: (x**2).sum() for name, x in named.items() if x is not None}

  def found(arrays: Any, where: Any, out: Any) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(0), SIGNS)
    draws = [squares(arrays, where, out, key) for key in keys]
    return jax.tree.map(lambda *x: float(np.mean(x)) ** 0.5, *draws)

  return found


def errors(
  got: tuple[Any, ...], want: tuple[Any, ...], least: Mapping[str, float] | None = None
) -> dict[str, float]:
  """‖got − want‖ / ‖want‖ of each result; infinite where one of the two alone is not finite.

  ‖want‖ counts as at least what `least` gives for it, as `chance` does for sums over pairs; else
  its elements as at least `LEAST` on average, for gradients that cancel to nothing.
  """
  found = {}
  names = itertools.chain(NAMES, (f"d_scores_{n}" for n in itertools.count()))
  for name, x, y in zip(names, got, want, strict=False):
    if y is None:
      continue
    x, finite = np.asarray(x, np.float64), np.isfinite(y)
    if (np.isfinite(x) != finite).any() or (x[~finite] != y[~finite]).any():
      found[name] = np.inf
      continue
    x, y = x[finite], y[finite]
    size = max(np.linalg.norm(y), (least or {}).get(name, LEAST * x.size**0.5))
    found[name] = float(np.linalg.norm(x - y) / size) if x.size else 0.0
  return found
