"""Exact attention in tiles, in plain XLA: for every backend, skipping tiles a mask leaves empty.

The mathematics is in `forward` and `derivatives`; here they become one differentiable function.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import numerics
from effjax.core.linear_map import linear_map
from effjax.core.typing import Array, Float, Int
from effjax.kernels.flash_attention import row_bias
from effjax.kernels.flash_attention.tile_map.sight import Where
from effjax.kernels.flash_attention.tile_map.terms import Terms
from effjax.kernels.flash_attention.tiled import derivatives, forward
from effjax.kernels.flash_attention.tiled.layout import Plan
from effjax.kernels.flash_attention.tiled.tiles import Tiles, choose


@row_bias.outside
def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  mask: Any,
  scale: float,
  logit_softcap: float | Float[Array, ""] | None = None,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  scores: Any = None,
  segment_ids: tuple[Int[Array, "#B T"], Int[Array, "#B S"]] | None = None,
  query_positions: Int[Array, "#B T"] | None = None,
  tiles: Tiles | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """Attention and its log-sum-exp; time follows the tiles visited, memory is linear in T and S.

  Args:
    mask: a pytree with `features`, `predicate` and `spans`, as in `effjax.attention.masks`.
    scores: a pytree with `features`, `line` and `term`, as in `effjax.attention.scores`.
    segment_ids: of queries and keys; equal ids ≥ 0 see each other, within the mask.
    query_positions: absolute position of each query; the last T of S when None.
    tiles: sizes to work in, chosen for the backend when None.

  Derivatives of out and lse by query, key, value, bias, the scores' arrays and a cap that is data
  are exact in both modes, forwards over each included. Reverse-mode over derivatives raises
  ValueError; the reference does that too.
  """
  plan = _planned(query, key, value, mask, scale, logit_softcap, tiles)
  where = Where(mask, segment_ids, query_positions)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  terms = Terms.of(scores, logit_softcap, plan.T, plan.S, query_positions, wide)
  operands = (query, key, value, bias, where, terms)
  return _attention(plan, *numerics.vary_alike(operands, operands))[:2]


def values(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  where: Where,
  terms: Terms | None,
  scale: float,
  logit_softcap: float | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """`attention` with what is seen and added worked out before, and without derivatives."""
  plan = _planned(query, key, value, where.mask, scale, logit_softcap)
  return forward.attention(plan, query, key, value, None, where, terms)[:2]


def gradients(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  results: tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]],
  cotangents: tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]],
  *,
  where: Where,
  terms: Terms | None,
  scale: float,
  logit_softcap: float | None = None,
) -> tuple[Array, Array, Array, list[Array]]:
  """Gradients of query, key, value and what trains in the terms, as far as these keys go.

  Args:
    results: out and log-sum-exp of attention to these keys and any others.
    cotangents: theirs.
  """
  plan = _planned(query, key, value, where.mask, scale, logit_softcap)
  saved = (query, key, value, None, where, terms, *results, jnp.zeros_like(results[1]))
  d_query, d_key, d_value, _, d_terms = derivatives.backward(plan, saved, cotangents)
  return d_query, d_key, d_value, d_terms


def term_gradients(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  bias: Float[Array, "#B #N #T #S"] | None,
  where: Where,
  terms: Terms,
  results: tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"], Float[Array, "B T N"]],
  cotangents: tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]],
  *,
  scale: float,
  logit_softcap: float | None = None,
) -> list[Array]:
  """Gradients of what trains in the terms alone, for kernels that leave them to XLA.

  Args:
    results: out, log-sum-exp, and what the latter's rounding left out.
    cotangents: theirs.
  """
  plan = _planned(query, key, value, where.mask, scale, logit_softcap)
  saved = (query, key, value, bias, where, terms, *results)
  return derivatives.of_terms(plan, saved, cotangents)


def _planned(query, key, value, mask, scale, softcap, tiles=None) -> Plan:
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  tiles = tiles or choose(B, T, S, K, N // K, mask)
  softcap = None if isinstance(softcap, jax.Array) else softcap
  return Plan(B, T, S, K, N // K, H, value.shape[-1], tiles, float(scale), softcap)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(plan, query, key, value, bias, where, terms):
  return forward.attention(plan, query, key, value, bias, where, terms)


@_attention.defjvp
def _attention_jvp(plan, primals, tangents):
  *results, rest = _attention(plan, *primals)
  along = functools.partial(derivatives.tangents, plan)
  back = functools.partial(derivatives.backward, plan)
  moves = *tangents[:4], [] if tangents[5] is None else tangents[5].trained
  moved = linear_map(along, back, (*primals, *results, rest), moves, tuple(results))
  return (*results, rest), (*moved, jnp.zeros_like(rest))
