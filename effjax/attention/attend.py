"""Attention on arrays: the one entry through which every module attends."""

from effjax.attention import masks
from effjax.core.typing import Array, Float, Int
from effjax.kernels.flash_attention import reference


def attend(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  mask: masks.Mask | None = None,
  scale: float | None = None,
  logit_softcap: float | None = None,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  segment_ids: Int[Array, "B S"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
  query_positions: Int[Array, "B T"] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """softmax(scale · query keyᵀ) value over the keys the mask lets each query see."""
  if implementation not in (None, "reference"):
    raise ValueError(f"implementation={implementation!r} is not available; there is 'reference'")
  if segment_ids is not None:
    documents = masks.Documents(segment_ids)
    mask = documents if mask is None else mask & documents
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  q_index = None if query_positions is None else query_positions[:, None, :, None]
  out, lse = reference.attention(
    query,
    key,
    value,
    mask=mask,
    scale=scale,
    logit_softcap=logit_softcap,
    bias=bias,
    q_index=q_index,
  )
  return (out, lse) if return_lse else out
