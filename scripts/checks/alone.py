"""Programs that hold one kernel of fused attention each, so that its figures are its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.attention.masks import Causal, Documents, Full
from effjax.kernels.flash_attention.fused import frame, gpu, tpu
from effjax.kernels.flash_attention.fused.jobs import Job, Kernels
from effjax.kernels.flash_attention.fused.sizes import Sizes, choose

KERNELS = ("forward", "queries", "keys", "bias")
MASKS = {"full": lambda ids: Full(), "causal": lambda ids: Causal(), "documents": Documents}
BATCH, LENGTH, HEADS, GROUPS = 4, 4096, 8, 4  # more than VMEM holds, so that tiles are streamed
_PLATFORMS = {"gpu": gpu.KERNELS, "tpu": tpu.KERNELS}


@dataclasses.dataclass(frozen=True)
class Case:
  """A type, a head width, a mask: "bfloat16-128-causal"."""

  dtype: str
  width: int
  mask: str

  @classmethod
  def of(cls, name: str) -> "Case":
    """The case of a name.

    Raises:
      ValueError: if it is not one.
    """
    dtype, _, rest = name.partition("-")
    width, _, mask = rest.partition("-")
    if mask not in MASKS or not width.isdecimal() or dtype not in ("bfloat16", "float32"):
      raise ValueError(
        f"case={name!r}; allowed: bfloat16 or float32, a width, and one of {', '.join(MASKS)}, "
        "as in bfloat16-128-causal"
      )
    return cls(dtype, int(width), mask)

  def __str__(self) -> str:
    return f"{self.dtype}-{self.width}-{self.mask}"

  @property
  def kernels(self) -> tuple[str, ...]:
    """Those worth compiling: without a mask none has a part that it has not with a causal one."""
    return KERNELS[:1] if self.mask == "full" else KERNELS

  def sizes(self, platform: str, length: int = LENGTH, device: str | None = None) -> Sizes:
    """The table's, for a device of that name or the one that is here."""
    return choose(platform, self.dtype, self.width, length, length, device)

  def arguments(self, kernel: str, length: int = LENGTH) -> tuple[Any, ...]:
    """Shapes and types of query, key, value, ids and, for its own kernel, a bias."""
    array = lambda heads: (BATCH, length, heads, self.width)
    shapes = [array(HEADS), array(GROUPS), array(GROUPS)]
    *heads, bias = (
      jax.ShapeDtypeStruct(shape, self.dtype) for shape in [*shapes, (1, HEADS, length, length)]
    )
    ids = jax.ShapeDtypeStruct((BATCH, length), jnp.int32)
    return *heads, ids, bias if kernel == "bias" else None

  def draw(self, kernel: str, length: int = LENGTH) -> tuple[Any, ...]:
    """Random `arguments`; one document."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    return jax.tree.map(
      lambda x: (
        jax.random.normal(next(keys), x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.zeros(x.shape, x.dtype)
      ),
      self.arguments(kernel, length),
    )


def program(
  case: Case, kernel: str, platform: str, sizes: Sizes | None = None, interpret: bool = False
) -> Callable[..., Any]:
  """A function of the case's arguments that runs one kernel, in the table's sizes by default."""
  kernels = _alone(_PLATFORMS[platform], kernel)

  def run(query, key, value, ids, bias):
    attention = lambda *arrays: frame.attention(
      kernels,
      *arrays[:3],
      bias=arrays[3],
      mask=MASKS[case.mask](ids),
      scale=case.width**-0.5,
      logit_softcap=None,
      segment_ids=None,
      query_positions=None,
      sizes=sizes,
      interpret=interpret,
    )
    if kernel == "forward":
      return attention(query, key, value, bias)
    (_, lse), backward = jax.vjp(attention, query, key, value, bias)
    d_query, d_key, d_value, d_bias = backward((query, jnp.zeros_like(lse)))
    return {"queries": d_query, "keys": (d_key, d_value), "bias": d_bias}[kernel]

  return run


def _alone(kernels: Kernels, name: str) -> Kernels:
  """The platform with one of its kernels; the others give zeros."""

  def silent(run: Callable[[Job], Any]) -> Callable[[Job], Any]:
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    return lambda job: jax.tree.map(zeros, jax.eval_shape(lambda: run(job)))

  others: dict[str, Any] = {
    each: silent(getattr(kernels, each)) for each in KERNELS if each != name
  }
  return dataclasses.replace(kernels, **others)
