"""The table that joins our parameters to a family's tensors, read in both directions."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from effjax.layers.spec import TransformerConfig

Span = tuple[int, int, int]
EXPERT = "{e}"


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter and the tensor it lies in.

  Attributes:
    path: our parameter, from the layer or from the top.
    name: the tensor; "{i}" stands for the number of the layer, "{e}" for that of the expert, where
      each expert has a tensor and the parameter holds those of all along its first axis.
    transpose: the tensor is [out, in], ours [in, out].
    shift: ours is the tensor plus this (Gemma stores the scale of a norm less 1).
    together: the parameters whose last axes lie side by side in the tensor, in this order; none
      where it holds ours alone. Which part is ours is a span (first, past the last, of how many).
  """

  path: str
  name: str
  transpose: bool = False
  shift: float = 0.0
  together: tuple[str, ...] = ()

  def tensor_shape(self, shape: Sequence[int], span: Span | None = None) -> tuple[int, ...]:
    """The shape that the tensor must have for a parameter of `shape`.

    Example:
      >>> Entry("query/kernel", "c_attn.weight").tensor_shape((4, 4), (0, 4, 12))
      (4, 12)
    """
    whole = tuple(shape) if span is None else (*shape[:-1], span[2])
    return whole[::-1] if self.transpose else whole

  def dtype(self, wanted: np.dtype) -> np.dtype:
    """The type of the parameter in a model of type `wanted`.

    What is stored less a shift stays in float32: near 1, bfloat16 has not the bits to give back
    what was stored.
    """
    return np.dtype(np.float32) if self.shift else wanted

  def load(self, source, name: str, out: np.ndarray, span: Span | None = None) -> None:
    """Fills `out`, the parameter, from the tensor `name` of a `TensorSource`."""
    if span is None and not self.shift:
      source.read(name, out.T if self.transpose else out)
      return
    out[...] = self.part(source.read(name), span)

  def part(self, tensor: np.ndarray, span: Span | None = None) -> np.ndarray:
    """The parameter in a tensor, float32: what `unload` undoes where it is all of it."""
    value = tensor.T if self.transpose else tensor
    value = value if span is None else value[..., span[0] : span[1]]
    return value.astype(np.float32) + np.float32(self.shift)

  def unload(self, value: np.ndarray) -> np.ndarray:
    """The tensor from the parameter, or from those of `together` side by side."""
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
HEAD_NORMS = (
  Entry("mixer/query_norm/scale", "layers.{i}.self_attn.q_norm.weight"),
  Entry("mixer/key_norm/scale", "layers.{i}.self_attn.k_norm.weight"),
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
    to_config: config.json as a dict, and what errors shall begin with and how many layers there can
      be, as `fields.complete` has it → `TransformerConfig`.
    from_config: the inverse; raises ValueError for what the family cannot express.
    layer: entries of one layer. An entry whose parameter a model lacks is left out.
    rest: entries outside the layers.
    prefixes: what may stand before the names of `layer` and `rest`; the first is written.
    unprefixed: beginnings of names that stand without a prefix.
    ignored: regular expressions of tensors that are known and not used.
    renamed: endings of names that other files have → those of the table.
    stacked: endings of tensors that hold all experts, with matrices side by side [E, rows, …] →
      those of the table for each, in order.
  """

  name: str
  architecture: str
  to_config: Callable[..., TransformerConfig]
  from_config: Callable[[TransformerConfig], dict[str, Any]]
  layer: tuple[Entry, ...]
  rest: tuple[Entry, ...]
  prefixes: tuple[str, ...]
  unprefixed: tuple[str, ...] = ("lm_head.",)
  ignored: tuple[str, ...] = ()
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stacked: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

  def canonical(self, name: str) -> str:
    """The name of a tensor as `layer` and `rest` have it."""
    for old, new in self.renamed.items():
      if name.endswith(old):
        name = name.removesuffix(old) + new
    if name.startswith(self.unprefixed):
      return name
    matching = [prefix for prefix in self.prefixes if prefix and name.startswith(prefix)]
    return name.removeprefix(max(matching, key=len, default=""))

  def written(self, name: str) -> str:
    """The name under which a saved folder holds the tensor."""
    return name if name.startswith(self.unprefixed) else self.prefixes[0] + name
