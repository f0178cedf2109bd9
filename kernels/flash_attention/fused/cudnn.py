"""Attention by cuDNN where it honours the call, else by the GPU kernel, saying why.

cuDNN multiplies what it hides by a weight of zero, which a NaN survives. Where something is hidden,
what it gives is therefore looked at, and is computed again by the GPU kernel unless it is finite.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax import lax

from effjax.core import numerics
from effjax.core.typing import Array, Bool, Float, PyTree
from effjax.kernels.flash_attention.fused import frame, gpu

_LEAST = 16  # queries and keys that it is asked for


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  return_lse: bool = False,
  **arguments: Any,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
  """Attention, arguments as of `tiled.xla.attention`; no log-sum-exp unless `return_lse`.

  Each reason why it is not by cuDNN is logged once.
  """
  refused = refusal(query, key, value, return_lse=return_lse, **arguments)
  band = _band(arguments["mask"], query.shape[1], key.shape[1])
  if band is None or refused:
    _tell(str(refused))
    return gpu.attention(query, key, value, **arguments)
  call = _Call(arguments["mask"], arguments["scale"], *band)
  arrays = query, key, value, arguments["bias"]
  return _attention(call, *numerics.vary_alike(arrays, arrays)), None


def refusal(query: Array, key: Array, value: Array, *, return_lse: bool, **arguments) -> str | None:
  """What cuDNN cannot honour, or None."""
  (T, _, H), (S, _, Hv) = query.shape[1:], value.shape[1:]
  mask, bias, widest = arguments["mask"], arguments["bias"], _widest()
  band = _band(mask, T, S)
  reasons = {
    "a device that is no NVIDIA GPU of compute capability 8.0 or later": widest == 0,
    f"type {query.dtype}": query.dtype not in (jnp.bfloat16, jnp.float16),
    "the log-sum-exp": return_lse,
    "scores": arguments.get("scores") is not None,
    "a soft cap": arguments["logit_softcap"] is not None,
    "segment ids": arguments["segment_ids"] is not None,
    "query positions": arguments["query_positions"] is not None,
    f"mask {type(mask).__name__}": band is None,
    f"{'fewer' if T < S else 'more'} queries than keys": band not in (None, (None, None))
    and T != S,
    f"head widths {H} and {Hv}": Hv != H or H % 8 > 0 or widest < H,
    f"scale {arguments['scale']}": not arguments["scale"] > 0,
  }
  if bias is not None:
    reasons |= {
      "a bias shared along queries or keys": bias.shape[2:] != (T, S),
      f"a bias of {bias.dtype}": bias.dtype != query.dtype,
      "a bias of an odd length": T % 2 + S % 2 > 0,
      "a bias and a window": band is not None and band[0] is not None,
    }
  reasons[f"{T} queries and {S} keys, fewer than {_LEAST}"] = min(T, S) < _LEAST
  return next((reason for reason, holds in reasons.items() if holds), None)


@functools.cache
def _tell(reason: str) -> None:
  logging.warning("attention: not by cuDNN: %s", reason)


def _widest() -> int:
  """The widest head that cuDNN takes on this device, 0 where there is no cuDNN for it."""
  version = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
  major = int(version) if version.isdecimal() else 0
  return 0 if major < 8 else 128 if major == 8 else 256


def _band(mask: Any, T: int, S: int) -> tuple[int | None, int | None] | None:
  """(left, right) of a band that cuDNN knows: everything, or causal, with a window or without."""
  if mask.band is None:
    return None
  farthest = S - 1, T - 1  # that a key can be to the left and to the right of a query
  left, right = (
    None if x is None or x >= most else x for x, most in zip(mask.band, farthest, strict=True)
  )
  return (left, right) if right == 0 or (left, right) == (None, None) else None


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is known of a call while tracing; (left, right) are those of `_band`."""

  mask: Any
  scale: float
  left: int | None
  right: int | None

  def by_cudnn(self, query: Array, key: Array, value: Array, bias: Array | None) -> Array:
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      bias=bias,
      scale=self.scale,
      is_causal=self.right == 0,
      local_window_size=None if self.left is None else (self.left, 0),
      implementation="cudnn",
    )

  def by_kernel(self, query: Array, key: Array, value: Array, bias: Array | None) -> Array:
    return gpu.attention(query, key, value, mask=self.mask, scale=self.scale, bias=bias)[0]

  def sure(self, found: PyTree, bias: Array | None, otherwise: Callable[[], PyTree]) -> PyTree:
    """What cuDNN found where nothing hidden can have got into it, else what `otherwise` gives."""
    if self.right is None and bias is None:
      return found
    good = _finite(jax.tree.leaves(found))
    return lax.cond(good if bias is None else good & self._sees(bias), lambda: found, otherwise)

  def _sees(self, bias: Array) -> Bool[Array, ""]:
    """Whether the bias leaves each query a key to see."""
    q, k = (lax.broadcasted_iota(jnp.int32, (1, 1, *bias.shape[2:]), axis) for axis in (2, 3))
    seen = (bias > -jnp.inf) & self.mask.predicate(q, k, (), ())
    return _all(seen.any(-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call, *arrays):
  out = call.by_cudnn(*_together(arrays))
  return call.sure(out, arrays[3], lambda: call.by_kernel(*arrays))


def _attention_fwd(call, *arrays):
  arrays = _together(_once(arrays))
  found, pull = jax.vjp(call.by_cudnn, *arrays)
  out = call.sure(found, arrays[3], lambda: call.by_kernel(*arrays))
  # Kept once: the output that cuDNN wants back is this one, or no good for a derivative either.
  return out, (arrays, jax.tree.map(lambda x: out if x is found else x, pull))


def _attention_bwd(call, saved, d_out):
  (arrays, pull), d_out = _together(_once((saved, d_out)))
  found = pull(d_out)
  return call.sure(found, arrays[3], lambda: jax.vjp(call.by_kernel, *arrays)[1](d_out))


_attention.defvjp(_attention_fwd, _attention_bwd)


@jax.custom_jvp
def _once(arrays: PyTree) -> PyTree:
  """The arrays, of which there is no other derivative."""
  return arrays


_once.defjvp(frame.no_tangents)


@jax.custom_batching.custom_vmap
def _together(arrays: PyTree) -> PyTree:
  """The arrays, all of them mapped over their first axis where one is mapped over."""
  return arrays


@_together.def_vmap
def _(size, mapped, arrays):
  def spread(one: bool, x: Array) -> Array:
    return x if one else jnp.broadcast_to(x[None], (size, *x.shape))

  return _together(jax.tree.map(spread, mapped[0], arrays)), jax.tree.map(lambda _: True, mapped[0])


@jax.custom_batching.custom_vmap
def _all(x: Array) -> Array:
  """Whether all are true, of mapped arrays too, so that a condition stays one."""
  return x.all()


@_all.def_vmap
def _(size, mapped, x):
  return _all(x), False


def _finite(arrays: list[Array]) -> Array:
  return functools.reduce(jnp.logical_and, (_all(jnp.isfinite(x)) for x in arrays))
