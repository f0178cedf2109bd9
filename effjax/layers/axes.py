"""What the axes of a model's parameters are: a role for each axis, by path.

A module states the roles of the parameters that it makes as a property `axes`, such as
{"query/kernel": ("embed", "heads"), …}, and `axes(config)` puts the statements of a whole model
together. Pruning, placement and statistics by group read roles, never shapes or names of classes.

Within a place of a layer equal roles are one axis: unit i is the same unit wherever the role
stands, and what removes it removes it everywhere. "embed" and "vocab" are one axis throughout the
model. A unit is one entry, unless the module's property `units` gives the role a number: then every
axis of that role is so many equal blocks, as "heads" is N blocks of H columns in "query/kernel" and
N single entries in "sinks".
"""

from collections.abc import Mapping

from effjax.layers.embedding import Embed
from effjax.layers.spec import BRANCHES, TransformerConfig, ask, stated
from effjax.layers.stack import places

Axes = Mapping[str, tuple[str, ...]]

ROLES = {
  "embed": "model width D",
  "vocab": "entries V of the token table and of the logits",
  "table": "width of the token table where it is not D",
  "positions": "absolute positions",
  "token_types": "types of tokens",
  "layers": "repetitions R of a scanned segment",
  "heads": "query heads N",
  "kv_heads": "key-value heads K; head k is read by query heads k·N/K … (k+1)·N/K − 1",
  "head_width": "columns H within a head, one vector for all heads",
  "value_width": "columns H of the values within a head, one vector for all heads",
  "virtual": "virtual tokens P of a prefix",
  "modules": "modules A of a prefix, by the ids that choose them",
  "projected": "positions to which the length is projected",
  "hidden": "hidden units F of a feed-forward layer, or of each expert",
  "experts": "experts E",
  "choices": "choices of all segments of a MultiHash, one segment after another",
  "segment": "hidden units of one segment of a MultiHash",
  "segments": "hidden units of all its segments, one after another",
  "part": "channels of x that one of its segments gives",
  "hashes": "hashes of a token, one a column of their table",
  "buckets": "buckets of pairs of tokens",
  "periods": "positions up to which a table of them goes before it starts again",
  "shared_hidden": "hidden units of the experts that every token visits",
  "residual_hidden": "hidden units of the layer that a mixture is added to",
  "gate": "the one number that scales what every token visits",
  "branches": "the parts of a layer that are mixed",
  "far": "the channels of x that attend, where others convolve",
  "near": "the channels of x that convolve",
  "glu": "values of all convolved channels, then their gates",
  "channels": "convolved channels, in heads that share their taps",
  "taps": "taps of a convolution",
  "head_taps": "taps of all heads of a convolution, one head after another",
}


def axes(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
  """Path → the role of each axis, for every parameter of `Transformer(config)`.

  Parameters of scanned segments have "layers" before what their module states.

  Raises:
    ValueError: when a module states no `axes`.

  Example:
    >>> from effjax.layers import MLP, LayerSpec
    >>> found = axes(TransformerConfig(16, 4, (LayerSpec(None, MLP(8)),) * 2))
    >>> found["segments_0/layers_0/ffn/up/kernel"], found["embed/embedding"]
    (('layers', 'embed', 'hidden'), ('vocab', 'embed'))
  """
  found = _ends(config)
  for (segment, name, index), layer in zip(places(config), stated(config, "axes"), strict=True):
    roles = _layer(config, layer)
    found |= under(f"{segment}/{name}", roles if index is None else lead("layers", roles))
  return found


def linear_axes(name: str, inputs: str, outputs: str, use_bias: bool = False) -> dict:
  """The statement of a `Linear` called `name`.

  Example:
    >>> linear_axes("out", "heads", "embed", True)
    {'out/kernel': ('heads', 'embed'), 'out/bias': ('embed',)}
  """
  kernel = {f"{name}/kernel": (inputs, outputs)}
  return kernel | {f"{name}/bias": (outputs,)} if use_bias else kernel


def under(name: str, stated: Axes) -> dict:
  """A statement whose parameters lie under `name`."""
  return {f"{name}/{path}": roles for path, roles in stated.items()}


def lead(role: str, stated: Axes) -> dict:
  """A statement whose parameters are stacked along a first axis of that role."""
  return {path: (role, *roles) for path, roles in stated.items()}


def renamed(stated: Axes, **names: str) -> dict:
  """A statement with other roles: `embed="far"` puts "far" in place of "embed"."""
  return {path: tuple(names.get(role, role) for role in roles) for path, roles in stated.items()}


def _layer(config: TransformerConfig, layer: Mapping[str, Axes]) -> dict:
  """The statement of a layer of `models.transformer`, from those of its places."""
  found: dict = {}
  for place, roles in layer.items():
    found |= under(place, roles)
  norms = ("norm", "post_norm") if config.arrangement == "sandwich" else ("norm",)
  for branch in BRANCHES:
    for name in norms if branch in layer else ():
      found |= _norm(config, f"{branch}_{name}")
  return found


def _ends(config: TransformerConfig) -> dict:
  """The statement of what `models.transformer` has around its layers."""
  table = Embed(config.vocab_size, config.width, parent=None).axes
  width = "embed" if config.embed_width is None else "table"
  found = under("embed", renamed(table, embed=width))
  if config.embed_width is not None:
    found |= linear_axes("embed_in", "table", "embed")
    if config.head is not None:
      found |= linear_axes("embed_out", "embed", "table")
  if config.positions == "learned":
    found |= under("positions", renamed(table, vocab="positions"))
  if config.token_types:
    found |= under("token_types", renamed(table, vocab="token_types"))
  if config.head is not None and not config.tied:
    found |= linear_axes("head", width, "vocab")
  for name in ("embed_norm", "final_norm"):
    found |= _norm(config, name) if getattr(config, name) else {}
  return found


def _norm(config: TransformerConfig, name: str) -> dict:
  return under(name, ask(config.norm, "axes", "TransformerConfig: norm"))
