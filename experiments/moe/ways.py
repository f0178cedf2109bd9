"""Ways to split a pretrained model, and what they look at."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import moe
from effjax.core import trees
from effjax.core.typing import Int, Key, Size
from effjax.layers import LayerSpec, capture
from effjax.moe import splitting
from effjax.moe.splitting import Parts, Way
from effjax.moe.units import Site
from effjax.train import next_token
from experiments.lab.subject import Subject
from experiments.peft.methods import Method
from experiments.peft.tasks import Continuing

RANDOM, RESIDUAL, INNER = "random", "residual", "inner"
WAYS = (RANDOM, "clusters", "graph", "gradient", RESIDUAL, INNER)
RATE = 1e-4
AS_IT_IS = Method("dense", "", 0.0, lambda config, params, key: (config, params))


class Statistics:
  """What ways to split look at, of some rows of the training text; computed when asked for."""

  def __init__(self, task: Continuing, *, rows: int, groups: int, batch: int):
    """Of `rows` rows, in `groups` that are alike; activations are of `batch` at a time."""
    self._task, self._count, self._groups, self._batch = task, rows, groups, batch

  @functools.cached_property
  def _rows(self) -> dict[str, np.ndarray]:
    batches = self._task.batches(AS_IT_IS, self._task.subject.params, seed=0)
    drawn = [next(batches) for _ in range(-(-self._count // self._batch))]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *drawn)
    return {name: x[: self._count] for name, x in joined.items()}

  @functools.cached_property
  def co_activation(self) -> dict[str, Any]:
    subject, rows = self._task.subject, self._rows
    read = {name: x for name, x in rows.items() if name not in ("targets", "weights")}
    options: Any = {"reduce": splitting.co_activation, "select": r"ffn/down$"}
    return capture(subject.module, subject.params, _parts(read, self._batch), **options)

  @functools.cached_property
  def importance(self) -> list[dict[str, Any]]:
    """Of each group of rows that are alike."""
    subject = self._task.subject
    table = trees.select(subject.params, r"^embed/embedding$")["embed/embedding"]
    vectors = np.asarray(table)[self._rows["tokens"]].mean(axis=1)
    group = splitting.equal_clusters(vectors @ vectors.T, self._groups)
    objective = next_token(subject.module)
    rows = [{name: x[group == g] for name, x in self._rows.items()} for g in range(self._groups)]
    return [splitting.importance(objective, subject.params, [each]) for each in rows]


def _parts(batch: Mapping[str, np.ndarray], rows: int) -> list[dict[str, np.ndarray]]:
  count = len(batch["tokens"])
  cuts = range(0, count - count % rows or count, rows)
  return [{name: x[start : start + rows] for name, x in batch.items()} for start in cuts]


class Once:
  """A way to split that goes through each layer once, from one key, whatever it is given."""

  def __init__(self, way: Any):
    self._way, self._found = way, dict[int, Parts]()

  def __call__(self, site: Site, among: Int[np.ndarray, "F"], experts: Size, key: Key) -> Parts:
    if site.index not in self._found:
      self._found[site.index] = self._way()(site, among, experts, jax.random.key(0))
    return self._found[site.index]


def variants(
  statistics: Statistics, *, experts: int, top_k: int, scale: float | None = None
) -> dict[str, Method]:
  """Name → what is trained; what is shared counts as one of the experts."""
  inner = lambda: splitting.SharingInner(statistics.importance)

  def residual(site: Site, among: Any, experts: Size, key: Key) -> Parts:
    shared = len(among) // (experts + 1)
    way = splitting.Residual(splitting.Random(), statistics.importance, shared)
    return way(site, among, experts, key)

  ways: dict[str, Way] = {
    RANDOM: splitting.Random(),
    "clusters": Once(splitting.Clusters),
    "graph": Once(lambda: splitting.Graph(statistics.co_activation)),
    "gradient": Once(lambda: splitting.Important(statistics.importance)),
    RESIDUAL: residual,
    INNER: Once(inner),
  }

  def split(name: str):
    apart = name == RESIDUAL
    options: Any = {"experts": experts - apart, "top_k": top_k - apart, "scale": scale}
    return lambda shape, params, key: moe.split_ffn(shape, params, key, by=ways[name], **options)

  return {name: Method(name, "full", RATE, split(name)) for name in ways}


def with_k(subject: Subject, k: int) -> Subject:
  """The model with k experts for each token, of which what is shared is one."""

  def change(_: int, spec: LayerSpec) -> LayerSpec:
    if not isinstance(spec.ffn, moe.MoE):
      return spec
    router: Any = spec.ffn.router
    router = router.clone(top_k=k - (spec.ffn.shared is not None))
    return dataclasses.replace(spec, ffn=spec.ffn.clone(router=router))

  return subject.with_layers(change)


def all_on(subject: Subject, experts: int) -> Subject:
  """The model with all experts, and gates of one: those of routers that know no difference."""

  def change(_: int, spec: LayerSpec) -> LayerSpec:
    mixture: Any = spec.ffn
    router = mixture.router.clone(scale=mixture.router.experts)
    return dataclasses.replace(spec, ffn=mixture.clone(router=router))

  everyone = with_k(subject, experts).with_layers(change)
  zero = lambda path, x: jnp.zeros_like(x)
  return Subject(everyone.config, trees.update(everyone.params, r"ffn/router/kernel$", zero))
