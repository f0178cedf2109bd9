"""A model as a list of layer specifications.

Jamba is a pattern of mixers, "MoE every second layer" a pattern of feed-forward layers, Gemma's
five local to one global a pattern of masks: `layers` says it in the open.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.known import check_ids, number
from effjax.core.typing import Array, DTypeLike, Float, Number, PyTree, Size
from effjax.layers.context import Context
from effjax.layers.norms import RMSNorm
from effjax.layers.peeking import check_caches, check_direction, parts

BRANCHES = ("mixer", "cross", "ffn")  # each is added to the residual stream
BOUNDS: dict[str, dict] = {  # of the numbers of a configuration; optional ones may be None
  **{n: {"integer": True, "least": 1} for n in ("vocab_size", "width", "context", "embed_width")},
  **{n: {"integer": True, "least": 0} for n in ("position_offset", "token_types")},
  "embed_scale": {},
  "logit_softcap": {"above": 0},
}
PLACES = ("mixer", "after_mixer", "cross", "ffn", "after_ffn")


@runtime_checkable
class Mixer(Protocol):
  """What mixes positions: a module for the places `mixer` and `cross` of a layer.

  One by which tokens see later ones says `causal = False`, as a field or a property.

  Attributes:
    rewinds: whether a cache forgets the newest tokens by going on from an earlier position, as
      keys and values that lie by position do, and a recurrent state does not.
  """

  rewinds: ClassVar[bool]

  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context(), cache: PyTree = None
  ) -> tuple[Float[Array, "B T D"], PyTree]:
    """y, and the cache after x: it has absorbed each token once, those that are not there never.

    Whether a token is there, `context.segment_ids` says; see `Context`. At padding y is zero, and
    nothing that stands or comes back there has influence: see `without_padding`. A cache without
    room for a position refuses it, or, where it is not known while tracing, makes y NaN there.
    """
    ...

  def init_cache(
    self, width: int, batch: int, length: int, dtype: DTypeLike = jnp.float32
  ) -> PyTree:
    """The cache of a model of `width` before the first of `length` tokens.

    Args:
      dtype: in which it keeps what it keeps of each token: floats, or int8 with scales. States
        that tokens are added to may have a type of their own.

    Raises:
      ValueError: when this mixer cannot go on from a cache, or has none in `dtype`.
    """
    ...

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward, of the last `queries` of `length`; None means all."""
    ...


@runtime_checkable
class FeedForward(Protocol):
  """What acts on each position: a module for the place `ffn` of a layer.

  One whose tokens use a part of its parameters each says which, `share(path) -> float`.
  """

  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context()
  ) -> Float[Array, "B T D"]:
    """y, zero at padding, where nothing that stands or comes back has influence.

    See `without_padding`.
    """
    ...

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward, of the last `queries` of `length`; None means all."""
    ...


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """One layer: modules for its places; None leaves a place out.

  Attributes:
    mixer: mixes positions, a `Mixer`.
    ffn: acts on each position, a `FeedForward`.
    cross: attends to another sequence, between the two; a `Mixer` that is given no cache.
    after_mixer, after_ffn: act on what the mixer and the ffn give, its norm included, before it is
      added to the residual stream: adapters and gates; same protocol as `ffn`.
    tag: layers of different tags are never scanned together, so that what is no field of a module
      (the rank or the bits of a weight, which matrices have one) may differ between them.

  Raises:
    ValueError: for something after a place that is left out.
  """

  mixer: nn.Module | None
  ffn: nn.Module | None
  cross: nn.Module | None = None
  after_mixer: nn.Module | None = None
  after_ffn: nn.Module | None = None
  tag: Hashable = None

  def __post_init__(self):
    for place in ("mixer", "ffn"):
      after = getattr(self, f"after_{place}")
      if after is not None and getattr(self, place) is None:
        given = f"after_{place} is {type(after).__name__} and {place} None"
        raise ValueError(f"LayerSpec: {given}; allowed: nothing after what is left out")

  def __repr__(self) -> str:
    tag = "" if self.tag is None else f", tag={self.tag!r}"
    names = (type(module).__name__ for module in self.modules.values())
    return f"LayerSpec({' + '.join(names) or 'nothing'}{tag})"

  @property
  def modules(self) -> dict[str, nn.Module]:
    """Place → module, of the places that are not left out, in the order of computation."""
    filled = ((place, getattr(self, place)) for place in PLACES)
    return {place: module for place, module in filled if module is not None}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The shape of a model.

  Attributes:
    vocab_size: entries V of the token table.
    width: model width D.
    layers: one `LayerSpec` per layer.
    norm: the normalisation, an unbound module.
    arrangement: where it stands: "pre" x + f(norm(x)), "post" norm(x + f(x)), or "sandwich"
      x + norm(f(norm(x))).
    final_norm: whether a norm follows the last layer.
    positions: "learned" or "sinusoidal" vectors added to the embeddings; None adds none.
    context: the longest sequence.
    position_offset: where position 0 stands among the vectors, learned (2 in OPT) or sinusoidal.
    head: "lm" gives logits [B, T, V], None hidden states [B, T, D].
    tied: whether the head is the transposed token table.
    embed_width: width of the token table where it differs from D; projections join the two.
    embed_scale: factor of the embeddings (√D in Gemma).
    embed_norm: whether a norm follows the embeddings (BERT).
    token_types: rows of a token-type table, type 0 throughout (BERT); 0 for none.
    logit_softcap: caps the logits, see `numerics.softcap`.
    scan: equal neighbours share one compiled body and stacked parameters.
    family: which published layout the parameters save to, e.g. "llama"; None for none.

  Raises:
    ValueError: for values out of range, for a module with tables of another `vocabulary`, and for
      one that is for encoders only (`peeking`) where all mixers look back only.
  """

  vocab_size: Size
  width: Size
  layers: tuple[LayerSpec, ...]
  norm: nn.Module = RMSNorm()
  arrangement: str = "pre"
  final_norm: bool = True
  positions: str | None = None
  context: Size = 2048
  position_offset: Size = 0
  head: str | None = "lm"
  tied: bool = True
  embed_width: Size | None = None
  embed_scale: Number = 1.0
  embed_norm: bool = False
  token_types: Size = 0
  logit_softcap: Number | None = None
  scan: bool = True
  family: str | None = None

  def __post_init__(self):
    for name, bounds in BOUNDS.items():
      if (value := getattr(self, name)) is not None:
        object.__setattr__(self, name, number(name, value, of="TransformerConfig", **bounds))
    _check("arrangement", self.arrangement, ("pre", "post", "sandwich"))
    _check("positions", self.positions, (None, "learned", "sinusoidal"))
    _check("head", self.head, (None, "lm"))
    object.__setattr__(self, "layers", tuple(self.layers))
    every = self._places
    _check_vocabulary(every, self.vocab_size)
    check_direction(every, {at: part for at, part in every.items() if at.endswith(": mixer")})

  def check_caches(self) -> None:
    """Raises ValueError where some module looks at later tokens, so that there are no caches."""
    check_caches(self._places)

  @property
  def _places(self) -> dict[str, nn.Module]:
    """Every module by where it stands."""
    each = ((index, spec.modules.items()) for index, spec in enumerate(self.layers))
    return {f"layer {index}: {place}": module for index, of in each for place, module in of}

  def __repr__(self) -> str:
    runs = [(spec, len(list(same))) for spec, same in itertools.groupby(self.layers, repr)]
    shown = ", ".join(f"{count} × {spec}" for spec, count in runs[:3])
    more = f", … ({len(self.layers)} in all)" if len(runs) > 3 else ""
    name = f"{self.family}, " if self.family else ""
    sizes = f"vocab_size={self.vocab_size}, width={self.width}"
    return f"TransformerConfig({name}{sizes}, layers: {shown}{more})"


def stated(config: TransformerConfig, name: str) -> list[dict[str, Any]]:
  """For each layer, place → the attribute `name` of the module there.

  Raises:
    ValueError: for a module without one, by layer, place and class.
  """
  return [
    {place: ask(module, name, f"layer {index}: {place}") for place, module in spec.modules.items()}
    for index, spec in enumerate(config.layers)
  ]


def facts(config: TransformerConfig) -> set[str]:
  """The fields of `Context` that the model reads: segments and positions, and what modules say.

  A module that reads another field says so by `reads`, a tuple of names.

  Example:
    >>> sorted(facts(TransformerConfig(8, 4, ())))
    ['positions', 'segment_ids']
  """
  modules = [module for spec in config.layers for module in spec.modules.values()]
  return {"segment_ids", "positions"}.union(*(getattr(module, "reads", ()) for module in modules))


def check_attributes(config: TransformerConfig, attributes: Any) -> None:
  """Refuses ids of attributes that modules choose by and do not have, where the ids are known.

  A module that chooses says from how many by `attributes`.

  Raises:
    ValueError: for an id that is none of theirs; a negative one stands for none.
  """
  modules = (module for spec in config.layers for module in spec.modules.values())
  counts = [count for module in modules if (count := getattr(module, "attributes", 0))]
  if attributes is not None and counts:
    check_ids("attributes", attributes, min(counts), attributes >= 0)


def ask(module: nn.Module | None, name: str, where: str) -> Any:
  """The attribute `name` of a module; ValueError with what stands `where` if there is none."""
  if not hasattr(module, name):
    raise ValueError(f"{where} is {type(module).__name__}; allowed: modules that have `{name}`")
  return getattr(module, name)


def share(parts: Mapping[str, nn.Module], path: str) -> float:
  """The share of the parameter at `path` that one token uses, in a module made of `parts`.

  A part whose tokens do not use all of it says so by its own `share`; all else is used whole.

  Args:
    parts: the modules inside, by the names under which their parameters lie.
    path: of a parameter.
  """
  name, _, inside = path.partition("/")
  of = getattr(parts.get(name), "share", None)
  return 1.0 if of is None else of(inside)


def _check_vocabulary(places: Mapping[str, nn.Module], vocab_size: int) -> None:
  """Refuses what has a table of tokens, and says of how many by `vocabulary`, for other tokens."""
  for where, module in places.items():
    for part in parts(module):
      if getattr(part, "vocabulary", None) not in (None, vocab_size):
        given = f"{where} has {type(part).__name__} for {part.vocabulary} tokens"
        raise ValueError(f"{given}; allowed: {vocab_size}, the model's vocab_size")


def _check(name: str, value, allowed: tuple) -> None:
  if value not in allowed:
    raise ValueError(f"TransformerConfig: {name}={value!r}; allowed: {allowed}")
