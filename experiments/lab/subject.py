"""A model under study: where it comes from, what it costs, what it pays for a token."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from effjax import cost, models
from effjax.core import trees
from effjax.core.numerics import cross_entropy
from effjax.core.typing import Array, Key, Params
from effjax.data.tokenizers import ByteTokenizer, Tokenizer
from effjax.layers import stack
from effjax.layers.forward import forward
from effjax.models import LayerSpec, Transformer, TransformerConfig, packages, presets
from experiments.harness import Row


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model in some state of treatment.

  Attributes:
    config: its shape.
    params: its parameters; those of several seeds have a leading axis of seeds.
  """

  config: TransformerConfig
  params: Params

  @property
  def module(self) -> Transformer:
    return Transformer(self.config)

  def at(self, index: int) -> "Subject":
    """The model of one seed."""
    return Subject(self.config, jax.tree.map(lambda x: x[index], self.params))

  def with_layers(self, change: Callable[[int, LayerSpec], LayerSpec]) -> "Subject":
    """The model with `change(index, spec)` as its layers, their parameters regrouped."""
    keep = lambda index, spec, tree: (change(index, spec), tree)
    return Subject(*stack.change(self.config, self.params, keep))


def load(name: str) -> tuple[Subject, Tokenizer]:
  """A pretrained model and its tokenizer, or a preset without weights, at random, and bytes.

  Args:
    name: a name or path for `models.load`, or a preset such as "tiny".

  Raises:
    ValueError: for a model without a tokenizer.
  """
  if name in presets.PRESETS and name not in packages.PACKAGES and not Path(name).exists():
    shape = presets.preset(name)
    return Subject(shape, init(Transformer(shape), jax.random.key(0))), ByteTokenizer()
  model = models.load(name)
  if model.tokenizer is None:
    raise ValueError(f"model {name!r} came without a tokenizer; allowed: one with its own")
  return Subject(model.config, model.params), model.tokenizer


@functools.partial(jax.jit, static_argnums=0)
def init(module: Transformer, key: Key) -> Params:
  """The parameters of a module at initialisation."""
  return module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def fresh(config: TransformerConfig, seeds: Sequence[int]) -> Subject:
  """A model of each seed at initialisation."""
  return Subject(config, jax.vmap(functools.partial(init, Transformer(config)))(keys(seeds)))


def keys(seeds: Sequence[int]) -> Key:
  """A key of each seed, [seeds]."""
  return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def costs(subject: Subject, length: int) -> Row:
  """Parameters, active and trainable ones, bytes, and forward FLOPs a token at `length` tokens."""
  return {
    "parameters": cost.parameters(subject.params),
    "active": cost.active_parameters(subject.config, subject.params),
    "trainable": cost.trainable(subject.params),
    "bytes": trees.nbytes(subject.params),
    "flops_token": cost.flops(subject.config, length, subject.params),
  }


@functools.partial(jax.jit, static_argnums=0)
def token_nll(module: Transformer, params: Params, batch: dict) -> Array:
  """−log p of each target, [B, T] in nats; 0 where its weight is."""
  logits, _ = forward(module, params, batch)
  return cross_entropy(logits, batch["targets"], batch.get("weights"))
