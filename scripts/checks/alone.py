"""Programs that hold one kernel of fused attention each, so that its figures are its own."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention import masks
from effjax.attention.masks import Causal, Documents, Full
from effjax.attention.scores import ALiBi, RelativeBias, Term
from effjax.kernels.flash_attention.fused import frame, gpu, tpu
from effjax.kernels.flash_attention.fused.jobs import Job, Kernels
from effjax.kernels.flash_attention.fused.sizes import Sizes, choose

KERNELS = ("forward", "queries", "keys", "bias")
BATCH, LENGTH, HEADS = 4, 4096, 8  # more than VMEM holds, so that tiles are streamed


def _drawn(ids: Any) -> masks.Mask:
  return masks.bigbird(jax.random.key(0), ids.shape[1], heads=HEADS)


def _known(ids: Any) -> masks.Mask:
  with jax.ensure_compile_time_eval():
    return jax.tree.map(np.asarray, _drawn(ids))


causal = lambda ids: Causal()
# BigBird's blocks are known when tracing, or drawn by the program.
MASKS: dict[str, Callable[[Any], Any]] = {
  "full": lambda ids: Full(),
  "causal": causal,
  "window": lambda ids: masks.SlidingWindow(1023, 0),
  "longformer": lambda ids: masks.longformer(256, 2),
  "bigbird": _known,
  "drawn": _drawn,
  "documents": Documents,
}
MASKS |= dict.fromkeys(("bias", "alibi", "relative", "term", "cap"), causal)
_TERM = lambda q, k, a, b, w: a * b + w * (q - k < 9)
# What goes on beside a causal mask, by the name in the mask's place, from an array [32, HEADS].
SCORES = {
  "alibi": lambda x: {"scores": ALiBi.standard(HEADS)},
  "relative": lambda x: {"scores": RelativeBias(x)},
  "term": lambda x: {
    "scores": Term(
      _TERM, {"a": x[:1, :, None]}, {"b": jnp.zeros((1, 1, LENGTH))}, {"w": x.T[None, :, :31]}
    )
  },
  "cap": lambda x: {"logit_softcap": 30 + x[0, 0]},
}
_PLATFORMS = {"gpu": gpu.KERNELS, "tpu": tpu.KERNELS}


def on(platform: str) -> tuple[str, ...]:
  """The kernels of a platform."""
  return tuple(name for name in KERNELS if getattr(_PLATFORMS[platform], name) is not None)


@dataclasses.dataclass(frozen=True)
class Case:
  """A type, a head width, a mask or what else there is: "bfloat16-128-causal".

  Attributes:
    group: query heads of a key-value head, the last part of a name if it is not two.
  """

  dtype: str
  width: int
  mask: str
  group: int = 2

  @classmethod
  def of(cls, name: str) -> "Case":
    """The case of a name.

    Raises:
      ValueError: if it is not one.
    """
    found = re.fullmatch(r"(bfloat16|float32)-(\d+)-([a-z]+)(?:-([1248]))?", name)
    if found is None or found[3] not in MASKS:
      raise ValueError(
        f"case={name!r}; allowed: bfloat16 or float32, a width, one of {', '.join(MASKS)}, and "
        f"query heads of a group, as in bfloat16-128-causal or bfloat16-128-causal-1"
      )
    return cls(found[1], int(found[2]), found[3], int(found[4] or cls.group))

  def __str__(self) -> str:
    last = "" if self.group == Case.group else f"-{self.group}"
    return f"{self.dtype}-{self.width}-{self.mask}{last}"

  def kernels(self, platform: str) -> tuple[str, ...]:
    """Those worth compiling: that of a bias has no part that groups would change."""
    left = () if self.group == Case.group else ("bias",)
    return tuple(name for name in on(platform) if name not in left)

  def sizes(self, platform: str, length: int = LENGTH, device: str | None = None) -> Sizes:
    """The table's, for a device of that name or the one that is here."""
    mask = MASKS[self.mask](np.zeros((1, length), np.int32))
    return choose(platform, self.dtype, self.width, length, length, device, mask)

  def arguments(self, kernel: str, length: int = LENGTH, batch: int = BATCH) -> tuple[Any, ...]:
    """Shapes and types of query, key, value, ids, a table and, where it is used, a bias."""
    array = lambda heads: (batch, length, heads, self.width)
    shapes = [array(HEADS), *[array(HEADS // self.group)] * 2]
    *heads, bias = (
      jax.ShapeDtypeStruct(shape, self.dtype) for shape in [*shapes, (1, HEADS, length, length)]
    )
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    table = jax.ShapeDtypeStruct((32, HEADS), jnp.float32)
    return *heads, ids, table, bias if "bias" in (kernel, self.mask) else None

  def draw(self, kernel: str, length: int = LENGTH) -> tuple[Any, ...]:
    """Random `arguments`; one document."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    return jax.tree.map(
      lambda x: (
        jax.random.normal(next(keys), x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.zeros(x.shape, x.dtype)
      ),
      self.arguments(kernel, length),
    )


def program(
  case: Case,
  kernel: str,
  platform: str,
  sizes: Sizes | None = None,
  interpret: bool = False,
  watch: Callable[[Job], Any] = lambda job: None,
) -> Callable[..., Any]:
  """A function of the case's arguments that runs one kernel, in the table's sizes by default.

  Args:
    watch: gets what the kernel works on when it is traced.
  """
  kernels = _alone(_PLATFORMS[platform], kernel, watch)

  def run(query, key, value, ids, table, bias):
    attention = lambda *arrays: frame.attention(
      kernels,
      *arrays[:3],
      bias=arrays[3],
      mask=MASKS[case.mask](ids),
      scale=case.width**-0.5,
      sizes=sizes,
      interpret=interpret,
      **SCORES.get(case.mask, lambda table: {})(table),
    )
    if kernel == "forward":
      return attention(query, key, value, bias)
    (_, lse), backward = jax.vjp(attention, query, key, value, bias)
    d_query, d_key, d_value, d_bias = backward((query, jnp.zeros_like(lse)))
    return {"queries": d_query, "keys": (d_query, d_key, d_value), "bias": d_bias}[kernel]

  return run


def _alone(kernels: Kernels, name: str, watch: Callable[[Job], Any]) -> Kernels:
  """The platform with one of its kernels; the others give zeros."""

  def silent(run: Callable[[Job], Any]) -> Callable[[Job], Any]:
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    return lambda job: jax.tree.map(zeros, jax.eval_shape(lambda: run(job)))

  def watched(job: Job) -> Any:
    watch(job)
    return getattr(kernels, name)(job)

  chosen: dict[str, Any] = {
    each: watched if each == name else silent(getattr(kernels, each))
    for each in on(kernels.platform)
  }
  return dataclasses.replace(kernels, **chosen)
