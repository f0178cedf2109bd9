"""Every public technique has a row, and rows that are wrong fail.

What a technique is follows from what a name is: a module that mixes positions, feeds forward or
routes, a registered representation, a transform (first arguments `config, params`, or `params` to
changed params), an objective, a placement.
"""

import dataclasses
import importlib.util
import inspect
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest

import effjax
from effjax.core import trees
from effjax.core.register import REPRESENTATIONS, register
from effjax.core.typing import PyTree
from effjax.core.weights import Weight
from effjax.layers import Linear, without_padding
from effjax.parallel import Placement
from tests.contract import changes, layers_test, weights, weights_test
from tests.contract.layers import ROWS, LayerSpec, config, layer, model
from tests.contract.weights import WeightRow

ROOMS = ("attention", "moe", "ssm", "peft", "quant", "compress", "prune", "distill", "layers")
# Parts of techniques that rows go through, and what is no technique but writes or reads files.
PARTS = {"Embed", "LayerNorm", "RMSNorm", "save", "load", "trainable"}


def public(room: str) -> dict[str, Any]:
  """Name → what the room exports, and what is in the modules that it exports."""
  if importlib.util.find_spec(f"effjax.{room}") is None:
    return {}
  package = importlib.import_module(f"effjax.{room}")
  found = {name: getattr(package, name) for name in package.__all__}
  for module in [value for value in found.values() if inspect.ismodule(value)]:
    inside = lambda value: f"{getattr(value, '__module__', '')}."
    own = {
      f"{module.__name__}.{name}": value
      for name, value in vars(module).items()
      if name[0] != "_" and inside(value).startswith(f"{module.__name__}.")
    }
    found |= own
  return found


def is_layer(value: Any) -> bool:
  """Whether it is a module with a price: a mixer, a feed-forward layer, a router."""
  return inspect.isclass(value) and issubclass(value, nn.Module) and hasattr(value, "flops")


def is_transform(value: Any) -> bool:
  if not inspect.isfunction(value):
    return False
  signature = inspect.signature(value)
  names = list(signature.parameters)
  whole = names[:2] == ["config", "params"]
  return whole or (names[:1] == ["params"] and signature.return_annotation is PyTree)


def techniques() -> dict[str, Any]:
  """Name → every layer, transform, objective and representation that a room exports."""
  found = {}
  for room in ROOMS:
    for name, value in public(room).items():
      if name in PARTS:
        continue
      objective = inspect.isfunction(value) and name.endswith("_objective")
      if is_layer(value) or is_transform(value) or objective:
        found[name] = value
  own = {n: cls for n, cls in REPRESENTATIONS.items() if cls.__module__.startswith("effjax.")}
  return found | own


def covered() -> set[Any]:
  """Everything that some row goes through."""
  found: set[Any] = set()
  for row in ROWS:
    found |= inside(row.module)
    for leaf in trees.items(row.params).values():
      found |= weights.classes(leaf)
  for row in weights.ROWS:
    found |= weights.classes(row.of(weights.D, weights.F))
  found |= {type(row.router) for row in changes.ROUTERS}
  for row in (*changes.TRANSFORMS, *changes.OBJECTIVES):
    found |= set(row.of)
  return found


def inside(value: Any) -> set[Any]:
  """The classes of a module and of all that its fields hold."""
  if isinstance(value, tuple | list):
    return set().union(*map(inside, value))
  if not dataclasses.is_dataclass(value) or isinstance(value, type):
    return set()
  fields = [f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name")]
  return {type(value)}.union(*(inside(getattr(value, name, None)) for name in fields))


def test_every_technique_has_a_row():
  known = covered()
  missing = sorted(name for name, value in techniques().items() if value not in known)
  assert not missing, f"no row in tests/contract goes through {missing}"
  assert len(techniques()) >= 15


def test_every_placement_has_a_row():
  exported = [getattr(effjax.parallel, name) for name in effjax.parallel.__all__]
  methods = ("batch", "state", "scope", "on_batch", "on_params", "on_gradients", "on_state")
  placements = {
    x for x in exported
    if inspect.isclass(x) and x is not Placement and all(hasattr(x, name) for name in methods)
  }  # fmt: skip
  assert placements == {type(row.make()) for row in changes.PLACEMENTS}


def fails(row: Any, tests: ModuleType) -> list[str]:
  """The names of the tests of one row that it does not pass."""
  failed = []
  for name, test in vars(tests).items():
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["row"]:
      promise = getattr(test, "promise", None)
      if promise is not None and not getattr(row, promise):
        continue
      try:
        test(row)
      except Exception:
        failed.append(name)
  return failed


class Unscaled(Weight):
  """Integers times one scale, which lacks the leading axes; its checks are switched off."""

  codes: PyTree
  scale: PyTree

  shape = property(lambda self: tuple(self.codes.shape))
  dtype = property(lambda self: self.scale.dtype)

  def check(self):
    pass

  def materialize(self):
    return self.codes.astype(jnp.float32) * self.scale


class Forgetful(nn.Module):
  """A causal mean over positions that sees the tokens of this call alone, whatever the cache."""

  rewinds = True

  @nn.compact
  @without_padding
  def __call__(self, x, context=None, cache=None):
    seen = jnp.tril(jnp.ones((x.shape[1],) * 2))
    present = 1.0 if context is None or context.segment_ids is None else context.segment_ids >= 0
    seen = seen[None] * jnp.broadcast_to(present, x.shape[:2])[:, None]
    mean = seen @ x / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    return Linear(x.shape[-1], name="out")(mean.astype(x.dtype)), cache

  def init_cache(self, width, batch, length, dtype=jnp.float32):
    return jnp.zeros((batch, length, width), dtype)

  def flops(self, width, length, queries=None):
    return 2.0 * width**2


class Careless(nn.Module):
  """A linear feed-forward layer that reads padding too."""

  @nn.compact
  def __call__(self, x, context=None):
    return Linear(x.shape[-1], name="out")(x)

  def flops(self, width, length, queries=None):
    return 2.0 * width**2


def test_every_row_but_norms_promises_that_padding_has_no_influence():
  assert {row.name for row in ROWS if not row.padding} == {"RMSNorm", "LayerNorm"}


def test_a_layer_that_reads_padding_fails():
  failed = fails(layer("wrong", Careless(), padding=True), layers_test)
  assert failed == ["test_what_is_masked_has_no_influence"]


def test_a_weight_whose_scale_lacks_the_leading_axes_fails():
  wrong = register()(Unscaled)
  represent = lambda w, key: wrong(jnp.round(w * 100).astype(jnp.int8), jnp.full((1, 1), 0.01))
  failed = fails(WeightRow("wrong", represent), weights_test)
  assert "test_leading_axes_are_axes_of_every_field" in failed
  assert "test_in_every_place_it_computes_what_its_matrix_does" in failed
  REPRESENTATIONS.pop("Unscaled")


def test_a_mixer_that_ignores_its_cache_fails():
  promises = {"causal": True, "padding": True, "decodes": True}
  failed = fails(layer("wrong", Forgetful(), **promises), layers_test)
  assert failed == ["test_decoding_token_by_token_is_the_whole_forward"]


def test_a_model_of_such_a_mixer_fails():
  wrong = model("wrong", config(LayerSpec(Forgetful(), None)), packed=False)
  with pytest.raises(AssertionError):
    layers_test.test_decoding_token_by_token_is_the_whole_forward(wrong)
