"""The weight representations, alone and over one another, and what each must do.

A base holds a matrix itself; a wrapper stands over any base, and is crossed with them. A new
representation is one entry here. `PLACES` are the places of a model where a matrix stands; in each
a representation computes what the matrix that it stands for computes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax import quant
from effjax.core import linear, weights
from effjax.core.weights import Weight
from effjax.kernels.grouped_matmul import grouped_linear
from effjax.layers import MLP, Embed, LayerSpec, Linear, TransformerConfig, stack
from effjax.parallel import Zero, make_mesh
from effjax.peft import IA3, DoRA, LoRA, Named, Tuned, lora, named, soft_prompt
from effjax.quant import NF4, Int8
from tests.modules import normal

D, F, E, R, V = 32, 24, 3, 2, 32
X, WIDE = normal(8, 6, D, seed=1), normal(8, 6, F, seed=2)
IDS = jnp.asarray(np.random.default_rng(3).integers(0, V, (8, 6)), jnp.int32)
Represent = Callable[[jax.Array, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class WeightRow:
  """A representation: `represent(matrix [..., D, F], key)` is the weight, or the array itself.

  Attributes:
    name: what the table calls it.
    represent: makes it.
    rounding: of the largest number, what its products are off by besides.
    traced: whether it can be made in a program.
  """

  name: str
  represent: Represent
  rounding: float = 0.0
  traced: bool = True

  def of(self, *shape: int) -> Any:
    """The representation of a random matrix."""
    return represented(self.represent, shape, self.traced)


@functools.cache
def represented(represent: Represent, shape: tuple[int, ...], traced: bool = True) -> Any:
  matrix = np.asarray(normal(*shape, seed=sum(shape))) / np.float32(shape[-2] ** 0.5)
  return (jax.jit(represent) if traced else represent)(matrix, jax.random.key(0))


def adapted(base: Any, key: jax.Array) -> LoRA:
  """LoRA after some training: B is not zero."""
  w = lora.init(base, key, rank=4, scale=2.0)
  return dataclasses.replace(w, b=jax.random.normal(key, w.b.shape) / 10)


def turned(base: Any, key: jax.Array) -> DoRA:
  """DoRA after some training: the columns have lengths of their own."""
  w = DoRA.over(adapted(base, key))
  lengths = jax.random.uniform(key, w.magnitude.shape, minval=0.5, maxval=2)
  return dataclasses.replace(w, magnitude=w.magnitude * lengths)


def dropping(base: Any, key: jax.Array) -> LoRA:
  """LoRA that would drop some of what it sees in a step of training."""
  return dataclasses.replace(adapted(base, key), dropout=0.5)


def mixed(base: Any, key: jax.Array) -> Named:
  """A weighted sum of two adapters, one with lengths of its own."""
  members = {"fr": turned(base, key), "de": adapted(base, jax.random.fold_in(key, 1))}
  alone = {name: {"w": dataclasses.replace(w, base=None)} for name, w in members.items()}
  params = named.join(alone, {"w": base})
  return named.use(params, {"fr": 0.7, "de": -0.4})["w"]


def scaled(base: Any, key: jax.Array) -> quant.InputScaled:
  """Inputs scaled by up to 2 either way."""
  exponents = jax.random.uniform(key, (*base.shape[:-1], 1), minval=-1, maxval=1)
  return quant.InputScaled(base, 2**exponents)


def ia3_of(axis: int) -> Represent:
  """IA³ after some training, of the outputs (axis −1) or the inputs (−2)."""

  def wrap(base: Any, key: jax.Array) -> IA3:
    shape = list(base.shape)
    shape[-1 if axis == -2 else -2] = 1
    return IA3(base, jax.random.uniform(key, shape, minval=0.5, maxval=1.5))

  return wrap


def tuned(base: Any, key: jax.Array) -> Tuned:
  """A matrix after some training."""
  w = weights.materialize(base)
  return Tuned(base, w + jax.random.normal(key, w.shape) / 10)


def prompted(base: Any, key: jax.Array) -> soft_prompt.Prompted:
  """A table with two virtual tokens, which none of the ids is."""
  *batch, _, width = base.shape
  prompt = jax.random.normal(key, (*batch, 1, 2, width))
  return soft_prompt.Prompted(base, prompt, jnp.full((*batch, 1, 1), 2.0))


BASES: dict[str, Represent] = {
  "array": lambda w, key: w,
  "Int8": lambda w, key: Int8.quantize(w),
  "Int8 by row": lambda w, key: Int8.quantize(w, granularity="row"),
  "Int8Dynamic": lambda w, key: quant.Int8Dynamic.quantize(w),
  "LLMInt8": lambda w, key: quant.LLMInt8.quantize(w, threshold=2.0),
  "LLMInt8Exact": lambda w, key: quant.LLMInt8Exact.quantize(w, threshold=2.0, capacity=4),
  "NF4": lambda w, key: NF4.quantize(w, block=8),
  "NF4, double, of a table": lambda w, key: NF4.quantize(w, block=2, double=True, table=True),
  "FP4": lambda w, key: quant.FP4.quantize(w, block=16),
  "Int4": lambda w, key: quant.Int4.quantize(w, group=8),
  "Int4Affine": lambda w, key: quant.Int4Affine.quantize(w, group=8),
  "Palette": lambda w, key: quant.Palette.quantize(w, bits=3, steps=2),
  "GGUF": lambda w, key: quant.GGUF.quantize(w, type="Q4_1"),
  "Ternary": lambda w, key: quant.Ternary.quantize(w),
}
UNTRACED = ("Ternary",)
ROUNDING = {"Int8Dynamic": 0.02, "LLMInt8": 0.02, "LLMInt8Exact": 0.02}  # of activations
WRAPPERS: dict[str, Represent] = {
  "LoRA": adapted,
  "DoRA": turned,
  "InputScaled": scaled,
  "IA3": ia3_of(-1),
  "IA3 of inputs": ia3_of(-2),
  "Tuned": tuned,
  "Named": mixed,
  "Prompted": prompted,
}
STANDS_OVER = {  # others over all
  "DoRA": ("array", "NF4"),
  "Named": ("array", "Int8", "NF4", "LoRA"),
  "InputScaled": ("array", "Int8Dynamic", "Int4", "LoRA"),
  "IA3": ("array", "NF4, double, of a table", "LLMInt8", "LoRA"),
  "IA3 of inputs": ("array", "Int8"),
  "Tuned": ("array", "Int8"),
  "Prompted": ("array", "NF4", "LoRA"),
}
REFUSED = ("LoRA", "Prompted")  # the rows of virtual tokens are no rows of a matrix


def over(wrap: Represent, base: Represent) -> Represent:
  return lambda w, key: wrap(base(w, key), key)


def row(name: str, represent: Represent, base: str) -> WeightRow:
  return WeightRow(name, represent, ROUNDING.get(base, 0), base not in UNTRACED)


ROWS = [row(name, represent, name) for name, represent in BASES.items()]
ROWS += [
  row(f"{wrapper} over {name}", over(wrap, base), name)
  for wrapper, wrap in WRAPPERS.items()
  for name, base in (BASES | WRAPPERS).items()
  if name in STANDS_OVER.get(wrapper, (name,)) and (wrapper, name) != REFUSED
]
ROWS += [row("LoRA with dropout", over(dropping, BASES["array"]), "array")]
CROSSED = {  # what trains, over the bases with which it has no row of its own
  wrapper: [
    row(name, over(wrap, base), name)
    for name, base in BASES.items()
    if name not in STANDS_OVER.get(wrapper, (name,))
  ]
  for wrapper, wrap in WRAPPERS.items()
  if wrapper not in ("LoRA", "InputScaled")
}


def in_linear(w: Any, stacked: Any, table: Any) -> jax.Array:
  return Linear(F).apply({"params": {"kernel": w}}, X)


def in_a_product_from_either_side(w: Any, stacked: Any, table: Any) -> jax.Array:
  return jnp.concatenate([X @ w, (w @ WIDE[0].T).T[None].repeat(8, 0)], axis=-1)


def transposed(w: Any, stacked: Any, table: Any) -> jax.Array:
  return linear(WIDE, weights.transpose(w))


def in_a_tied_embedding(w: Any, stacked: Any, table: Any) -> jax.Array:
  embed, params = Embed(V, D), {"params": {"embedding": table}}
  rows = embed.apply(params, IDS)
  return jnp.concatenate([rows, embed.apply(params, X, method="logits")], axis=-1)


def in_experts(w: Any, stacked: Any, table: Any) -> jax.Array:
  return grouped_linear(X.reshape(-1, D), stacked, jnp.array([20, 0, 25]))


def in_a_scan(w: Any, stacked: Any, table: Any) -> jax.Array:
  return lax.scan(lambda _, one: (None, linear(X, one)), None, stacked)[1]


def split_into_layers(w: Any, stacked: Any, table: Any) -> jax.Array:
  """A scanned stack of E layers as trees of their own, put together again in the other order."""
  config = TransformerConfig(V, D, (LayerSpec(None, MLP(F)),) * E)
  params = {"segments_0": {"layers_0": {"kernel": stacked}}}
  layers, rest = stack.split(config, params)
  joined = stack.join(config, layers[::-1], rest)["segments_0"]["layers_0"]["kernel"]
  return jnp.stack([linear(X, layer["kernel"]) for layer in layers]) + in_a_scan(w, joined, table)


def gathered(w: Any, stacked: Any, table: Any) -> jax.Array:
  """Split over a mesh as ZeRO-3 splits it, and put together for each use."""
  zero = Zero(make_mesh(data=8), 3)
  params = zero.on_params(lax.with_sharding_constraint({"kernel": w}, zero.params({"kernel": w})))
  return linear(X, params["kernel"])


PLACES = (
  in_linear,
  in_a_product_from_either_side,
  transposed,
  in_a_tied_embedding,
  in_experts,
  in_a_scan,
  split_into_layers,
  gathered,
)


@jax.jit
def everywhere(w: Any, stacked: Any, table: Any) -> dict[str, jax.Array]:
  """What a weight [D, F], a stack [E, D, F] and a table [V, D] give in each place."""
  return {place.__name__: place(w, stacked, table) for place in PLACES}


@jax.jit
def plain(tree: Any) -> Any:
  """`tree` with arrays in place of its weights."""
  return jax.tree.map(weights.materialize, tree, is_leaf=weights.is_weight)


def classes(w: Any) -> set[type[Weight]]:
  """The representations in a weight, one inside another."""
  if not isinstance(w, Weight):
    return set()
  inner = [classes(getattr(w, field.name)) for field in dataclasses.fields(w)]
  return {type(w)}.union(*inner)
