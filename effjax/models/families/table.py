"""The table that joins our parameters to a family's tensors, read in both directions."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from effjax.layers.spec import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter and the tensor it lies in.

  Attributes:
    path: our parameter, from the layer or from the top.
    name: the tensor; "{i}" stands for the number of the layer.
    transpose: the tensor is [out, in], ours [in, out].
    shift: ours is the tensor plus this (Gemma stores the scale of a norm less 1).
    part: (which, of how many) equal blocks of the tensor's last axis ours is.
  """

  path: str
  name: str
  transpose: bool = False
  shift: float = 0.0
  part: tuple[int, int] | None = None

  def tensor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that the tensor must have for a parameter of `shape`.

    Example:
      >>> Entry("query/kernel", "c_attn.weight", part=(0, 3)).tensor_shape((4, 4))
      (4, 12)
    """
    shape = tuple(shape)[::-1] if self.transpose else tuple(shape)
    return shape if self.part is None else (*shape[:-1], shape[-1] * self.part[1])

  def load(self, source, name: str, out: np.ndarray) -> None:
    """Fills `out`, the parameter, from the tensor `name` of a `TensorSource`."""
    if self.part is None and not self.shift:
      source.read(name, out.T if self.transpose else out)
      return
    value = source.read(name).astype(np.float32)
    which, blocks = self.part or (0, 1)
    value = np.split(value, blocks, axis=-1)[which] + np.float32(self.shift)
    out[...] = value.T if self.transpose else value

  def unload(self, value: np.ndarray) -> np.ndarray:
    """The tensor, or its block, from the parameter."""
    if self.shift:
      value = (value.astype(np.float32) - np.float32(self.shift)).astype(value.dtype)
    return value.T if self.transpose else value


def linear(path: str, name: str, *, bias: bool = True) -> tuple[Entry, ...]:
  """The kernel of a PyTorch Linear and, if there can be one, its bias."""
  kernel = Entry(f"{path}/kernel", f"{name}.weight", transpose=True)
  return (kernel, Entry(f"{path}/bias", f"{name}.bias")) if bias else (kernel,)


def layer_norm(path: str, name: str) -> tuple[Entry, ...]:
  """Scale and bias of a PyTorch LayerNorm."""
  return Entry(f"{path}/scale", f"{name}.weight"), Entry(f"{path}/bias", f"{name}.bias")


# The blocks as Llama names them, and whoever followed.
SELF_ATTENTION = (
  *linear("mixer/query", "layers.{i}.self_attn.q_proj"),
  *linear("mixer/key", "layers.{i}.self_attn.k_proj"),
  *linear("mixer/value", "layers.{i}.self_attn.v_proj"),
  *linear("mixer/out", "layers.{i}.self_attn.o_proj"),
)
GATED_MLP = (
  *linear("ffn/gate", "layers.{i}.mlp.gate_proj"),
  *linear("ffn/up", "layers.{i}.mlp.up_proj"),
  *linear("ffn/down", "layers.{i}.mlp.down_proj"),
)


@dataclasses.dataclass(frozen=True)
class Family:
  """A published layout: its configurations, and where each parameter lies.

  Attributes:
    name: as in `TransformerConfig.family`.
    architecture: the transformers class that a saved folder names.
    to_config: config.json as a dict → `TransformerConfig`.
    from_config: the inverse; raises ValueError for what the family cannot express.
    layer: entries of one layer. An entry whose parameter a model lacks is left out.
    rest: entries outside the layers.
    prefixes: what may stand before the names of `layer` and `rest`; the first is written.
    unprefixed: beginnings of names that stand without a prefix.
    ignored: regular expressions of tensors that are known and not used.
  """

  name: str
  architecture: str
  to_config: Callable[[Mapping[str, Any]], TransformerConfig]
  from_config: Callable[[TransformerConfig], dict[str, Any]]
  layer: tuple[Entry, ...]
  rest: tuple[Entry, ...]
  prefixes: tuple[str, ...]
  unprefixed: tuple[str, ...] = ("lm_head.",)
  ignored: tuple[str, ...] = ()

  def canonical(self, name: str) -> str:
    """The name of a tensor without its prefix."""
    if name.startswith(self.unprefixed):
      return name
    matching = [prefix for prefix in self.prefixes if prefix and name.startswith(prefix)]
    return name.removeprefix(max(matching, key=len, default=""))

  def written(self, name: str) -> str:
    """The name under which a saved folder holds the tensor."""
    return name if name.startswith(self.unprefixed) else self.prefixes[0] + name
