"""An encoder with a prefix of modules: its start, its files, its training, and what it encodes."""

import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import flax as safetensors

from effjax.core import trees
from effjax.core.typing import Array, Params
from effjax.data.cache import write_whole
from effjax.layers.spec import TransformerConfig
from effjax.models import Transformer
from effjax.peft import prefix
from effjax.peft.retrieval import Encoder
from effjax.train import TrainState
from effjax.train import workdir as files
from effjax.train.step import Step
from experiments.peft.retrieval.task import Batch

GENERAL, MODULES = prefix.GENERAL, prefix.MODULES
BOTH = f"{GENERAL}|{MODULES}"
EVERY = 10  # steps of which the mean loss is a row
ROWS = 64  # of a call that encodes


@dataclasses.dataclass(frozen=True, eq=False)
class Prefixed:
  """A model that encodes, with P_general and modules.

  Attributes:
    config, params: of the model as it is.
    length: of the prefix.
    modules: how many.
    pool, unit: as in `Encoder`.
  """

  config: TransformerConfig
  params: Params
  length: int
  modules: int
  pool: str
  unit: bool

  def start(self, seed: int) -> Params:
    """The parameters with a random general prefix, and modules of zeros."""
    return self._added(seed)[1]

  @functools.cached_property
  def with_modules(self) -> TransformerConfig:
    return self._added(0)[0]

  @property
  def plain(self) -> Encoder:
    """The model as it is."""
    return self._encoder(self.config)

  @property
  def modular(self) -> Encoder:
    """The model whose rows choose modules by their attributes."""
    return self._encoder(self.with_modules)

  @functools.cached_property
  def weighed(self) -> Encoder:
    """The model of `fold`."""
    return self._encoder(prefix.fold(self.with_modules, self.start(0), {})[0])

  def fold(self, trained: Params) -> Params:
    """The parameters at "modules" with one prefix, their modules weighed by those at "weights"."""
    weights = dict(enumerate(trained["weights"]))
    return prefix.fold(self.with_modules, trained["modules"], weights)[1]

  def cosines(self, params: Params) -> list[list[float]]:
    """Between modules, each as one vector of its keys and values in all layers; 0 of none."""
    arrays = [x for path, x in arrays_of(params).items() if re.search(MODULES, path)]
    rows = [np.moveaxis(np.asarray(x, float), -4, 0).reshape(self.modules, -1) for x in arrays]
    joined = np.concatenate(rows, axis=1)
    lengths = np.linalg.norm(joined, axis=1, keepdims=True)
    unit = joined / np.where(lengths > 0, lengths, 1)
    return (unit @ unit.T).tolist()

  def save(self, path: Path, params: Params) -> None:
    """Writes the prefix and its modules alone."""
    write_whole(path, lambda file: file.write(safetensors.save(arrays_of(params))))

  def load(self, path: Path) -> Params:
    """The parameters with what `save` wrote."""
    found = safetensors.load_file(path)
    put = lambda path, x: found.get(trees.path_string(path), x)
    return jax.tree_util.tree_map_with_path(put, self.start(0))

  def _added(self, seed: int) -> tuple[TransformerConfig, Params]:
    return prefix.add(
      self.config,
      self.params,
      jax.random.key(seed),
      length=self.length,
      modules=self.modules,
      bidirectional=True,
    )

  def _encoder(self, config: TransformerConfig) -> Encoder:
    return Encoder(Transformer(config), self.pool, self.unit)


def arrays_of(params: Params) -> dict[str, Array]:
  """The arrays of the prefix and its modules, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  paths = ((trees.path_string(path), x) for path, x in leaves)
  return {path: x for path, x in paths if re.search(BOTH, path)}


def adam(rate: float, steps: int) -> optax.GradientTransformation:
  """Adam, a tenth of the steps warming up, then a cosine to 0; the gradient's norm at most 1."""
  warm = max(1, steps // 10)
  schedule = optax.warmup_cosine_decay_schedule(rate / warm, rate, warm - 1, steps + 1)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def train(
  name: str, step: Step, state: TrainState, batches: Iterable[Batch], steps: int, folder: Path
) -> Params:
  """The parameters after some steps; every few of them the mean loss is a row, "of" `name`."""
  losses: list[float] = []
  for number, batch in zip(range(1, steps + 1), batches, strict=False):
    state, metrics = step(state, batch, jax.random.key(0))
    losses.append(float(metrics["loss"]))
    if len(losses) == EVERY or number == steps:
      row = {"of": name, "step": number, "loss": float(np.mean(losses))}
      files.append_row(folder / files.METRICS, row)
      losses.clear()
  return state.params


def encode(
  encoder: Encoder, params: Params, batch: Batch, attributes: np.ndarray | None = None
) -> np.ndarray:
  """The vectors of all rows of a batch, some at a time; `attributes` [A] are those of every row."""
  count = len(batch["tokens"])
  whole = {name: np.pad(x, ((0, -count % ROWS), (0, 0))) for name, x in batch.items()}
  parts = []
  for start in range(0, count, ROWS):
    part = {name: jnp.asarray(x[start : start + ROWS]) for name, x in whole.items()}
    if attributes is not None:
      part["attributes"] = jnp.broadcast_to(attributes, (ROWS, len(attributes)))
    parts.append(np.asarray(_encode(encoder, params, part)))
  return np.concatenate(parts)[:count]


@functools.partial(jax.jit, static_argnums=0)
def _encode(encoder: Encoder, params: Params, batch: dict[str, Array]) -> Array:
  return encoder(params, batch)
