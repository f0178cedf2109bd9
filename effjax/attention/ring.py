"""Ring attention: a sequence over many devices, keys and values passed round between them."""

import dataclasses
import functools
import itertools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.attention import masks, parts
from effjax.attention import scores as score_values
from effjax.attention.attend import arrays, cap, check_places, scaled
from effjax.core import numerics, spmd
from effjax.core.typing import Array, Float, Int, PyTree
from effjax.kernels.flash_attention.tile_map.sight import Where
from effjax.kernels.flash_attention.tile_map.spans import Grid
from effjax.kernels.flash_attention.tile_map.terms import Terms
from effjax.kernels.flash_attention.tiled import xla


@spmd.on_any_mesh
@typing.no_type_check  # the checks below name what is wrong
def ring_attend(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K Hv"],
  *,
  axis: str,
  mask: masks.Mask | None = None,
  scale: float | Float[Array, "#N"] | None = None,
  logit_softcap: float | Float[Array, ""] | None = None,
  scores: score_values.Score | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  sinks: Float[Array, "N"] | None = None,
  return_lse: bool = False,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """`attend` inside `jax.shard_map`, over a sequence that lies in parts on a mesh axis.

  Of n devices, device i holds tokens i·T … (i + 1)·T − 1. Keys and values travel round: in step r a
  device attends to those of device i − r and joins the result to what it has by log-sum-exp. The
  backward pass sends them round again with their gradients. A device holds its own tokens and two
  visiting parts, whatever n is, and nothing of size T².

  Where the mask shows a device nothing of the visiting keys it computes nothing; with a mask known
  when tracing, a step that no device needs is left out, its communication too: a causal window over
  up to T earlier tokens takes two steps. Under a causal mask device i works in i + 1 of n steps,
  and the last one decides the time. To even that out, tokens would have to be dealt out in turns
  (Striped Attention, arXiv 2311.09431), which is not done here.

  Args:
    axis: the mesh axis.
    mask: at positions 0 … n·T − 1; what arrays it holds are of the whole sequence, on every device.
    scores: at the same positions; what arrays they hold are of the whole sequence, on every device.
    segment_ids: of the device's tokens; those of all are gathered.
    scale, logit_softcap, sinks, return_lse: as in `attend`.

  Raises:
    ValueError: shapes that do not fit.
    TypeError: forward-mode derivatives, which there are none of.

  Example:
    >>> from functools import partial
    >>> from effjax.parallel import make_mesh
    >>> mesh, spec = make_mesh(sequence=1), jax.P(None, "sequence")
    >>> attention = partial(ring_attend, axis="sequence", mask=masks.Causal())
    >>> x = jnp.ones((1, 8, 2, 4))
    >>> jax.jit(jax.shard_map(attention, mesh=mesh, in_specs=spec, out_specs=spec))(x, x, x).shape
    (1, 8, 2, 4)

  Reference: Ring Attention with Blockwise Transformers, arXiv 2310.01889, section 3.
  """
  mask = masks.Full() if mask is None else mask
  query, key, value, _, sinks = arrays(query, key, value, None, sinks)
  B, T, N, _ = query.shape
  if key.shape[1] != T:
    raise ValueError(f"ring_attend: key has {key.shape[1]} tokens; allowed: {T}, query's")
  size = lax.axis_size(axis)
  if segment_ids is not None:
    if segment_ids.shape != (B, T) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      given = f"shape {segment_ids.shape} of {segment_ids.dtype}"
      raise ValueError(f"segment_ids has {given}, expected {(B, T)} of integers")
    mask &= masks.Documents(lax.all_gather(segment_ids, axis, axis=1, tiled=True))
  whole = size * T
  check_places(B, whole, whole, N, mask, scores, None)
  query, scale = scaled(query, scale)
  logit_softcap = cap(logit_softcap)
  wide = numerics.wide(query.dtype)
  terms = Terms.of(scores, logit_softcap, whole, whole, None, wide)
  softcap = logit_softcap if isinstance(logit_softcap, float) else None
  ring = _Ring(axis, size, T, _needed(mask, size, T), scale, softcap)
  operands = (query, key, value, mask, terms)
  out, lse = _attention(ring, *numerics.vary_alike(operands, operands, lax.axis_index(axis)))
  if sinks is not None:
    out, lse = parts.add_sinks((out, lse), sinks[None, None])
  return (out, lse) if return_lse else out


@dataclasses.dataclass(frozen=True)
class _Ring:
  """What is known while tracing. In the step of offset r device i is visited by device i − r."""

  axis: str
  size: int
  tokens: int
  offsets: tuple[int, ...]
  scale: float
  softcap: float | None

  def view(self, mask: masks.Mask, terms: Terms | None, offset: Any) -> dict[str, Any]:
    """What is seen and added on this device in the step of `offset`, and the factor and cap."""
    here = lax.axis_index(self.axis)
    query, key = (device * self.tokens for device in (here, (here - offset) % self.size))
    shard = masks.Shard(mask, query, key, self.size * self.tokens)
    return {
      "where": Where(shard, None, None),
      "terms": None if terms is None else terms.shard(query, key, self.tokens),
      "scale": self.scale,
      "logit_softcap": self.softcap,
    }

  def move(self, tree: PyTree, by: int) -> PyTree:
    """`tree` as it is on the device `by` places before this one."""
    if by % self.size == 0:
      return tree
    pairs = [(i, (i + by) % self.size) for i in range(self.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree)

  def travel(self, step: Callable, visitors: PyTree, stay: PyTree, collect: PyTree) -> Any:
    """`stay` and `collect` after `stay, collect = step(offset, visitors, stay, collect)` of each.

    `visitors` and what they `collect` go from device to device, and the latter home at the end;
    what a step does not change can be on its way while it computes. Steps at equal distances are
    one loop.
    """

    def leg(state: Any, by: int) -> Any:
      offset, visitors, *state = state
      stay, collect = step(offset, visitors, *state)
      return offset + by, self.move(visitors, by), stay, self.move(collect, by)

    first, last = self.offsets[0], self.offsets[-1]
    state = jnp.int32(first), self.move(visitors, first), stay, collect
    for by, legs in itertools.groupby(b - a for a, b in itertools.pairwise(self.offsets)):
      loop = lambda state, _, by=by: (leg(state, by), None)
      state, _ = lax.scan(loop, state, length=len(list(legs)))
    stay, collect = step(*state)
    return stay, self.move(collect, -last)


def _needed(mask: masks.Mask, size: int, tokens: int) -> tuple[int, ...]:
  """Offsets at which some device sees some of the visiting keys, as far as is known."""
  if jax.tree.leaves(mask):
    return tuple(range(size))

  def needed(offset: int) -> bool:
    places = ((i * tokens, (i - offset) % size * tokens) for i in range(size))
    return any(_visited(masks.Shard(mask, *place, size * tokens), tokens) for place in places)

  return tuple(filter(needed, range(size))) or (0,)


def _visited(view: masks.Shard, tokens: int) -> Any:
  """Whether anything is seen of the visiting keys."""
  positions = np.arange(tokens, dtype=np.int32)[None]
  some, _ = view.spans(Grid.of(*(tokens,) * 4), *view.features(positions, tokens))
  return (some.stop > some.start).any()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  ring: _Ring, query: Array, key: Array, value: Array, mask: masks.Mask, terms: Terms | None
) -> parts.Part:
  wide = numerics.wide(query.dtype)

  def step(offset, visitors, part, collect):
    view = ring.view(mask, terms, offset)
    more = lambda part: parts.join(part, xla.values(query, *visitors, **view))
    seen = _visited(view["where"].mask, ring.tokens)
    return lax.cond(seen, more, lambda part: part, part), collect

  out = jnp.zeros((*query.shape[:3], value.shape[-1]), wide)
  part = numerics.vary_alike((out, jnp.full(query.shape[:3], -jnp.inf, wide)), query)
  (out, lse), _ = ring.travel(step, (key, value), part, ())
  return out.astype(query.dtype), lse


def _attention_fwd(ring, query, key, value, mask, terms):
  results = _attention(ring, query, key, value, mask, terms)
  return results, (query, key, value, mask, terms, results)


def _attention_bwd(ring, saved, cotangents):
  query, key, value, mask, terms, results = saved
  wide = numerics.wide(query.dtype)
  trained = [] if terms is None else terms.trained

  def step(offset, visitors, *sums):
    view = ring.view(mask, terms, offset)
    part = lambda arrays: ring.view(mask, terms.with_trained(arrays), offset)["terms"].trained
    widen = lambda found: jax.vjp(part, trained)[1](found)[0] if trained else []

    def more(sums):
      d_query, d_key, d_value, d_terms = xla.gradients(
        query, *visitors, results, cotangents, **view
      )
      return jax.tree.map(jnp.add, sums, ((d_query, widen(d_terms)), (d_key, d_value)))

    seen = _visited(view["where"].mask, ring.tokens)
    return lax.cond(seen, more, lambda sums: sums, sums)

  zeros = lambda arrays: numerics.vary_alike([jnp.zeros(x.shape, wide) for x in arrays], query)
  d_query, d_key, d_value = zeros((query, key, value))
  stay = d_query, zeros(trained)
  (d_query, d_trained), collected = ring.travel(step, (key, value), stay, (d_key, d_value))
  gradients = (d_query, *collected)
  d_arrays = (d.astype(x.dtype) for d, x in zip(gradients, saved[:3], strict=True))
  return *d_arrays, None, None if terms is None else terms.gradient(d_trained)


_attention.defvjp(_attention_fwd, _attention_bwd)
