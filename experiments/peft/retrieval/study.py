"""The rows of `modular_retrieval`: what is trained in which order, and what it is asked."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Params
from effjax.data import pairs
from effjax.train import init_state
from experiments import harness
from experiments.peft.retrieval import prefixed
from experiments.peft.retrieval.prefixed import encode, train
from experiments.peft.retrieval.setup import Config, Shared, checked
from experiments.peft.retrieval.task import NOTHING, Batch, Cell, word

BASE, FIRST, GENERAL, MODULES = "as it is", "general, first stage", "general", "modules"
NO_DOMAIN, NO_TASK, OTHER_DOMAIN = "without the domain's", "without the task's", "another domain's"
OWN, MIXED = "trained on it", "weights learned on it"
ORDERS = {FIRST: 0, GENERAL: 1, MODULES: 1, OWN: 2, MIXED: 3}  # of batches; equal ones are paired


class Study:
  """What is measured, and how.

  Attributes:
    config: the settings.
    folder: of the results; what is trained is kept there.
  """

  def __init__(self, config: Config, folder: Path):
    self.domains, self.tasks, self.seeds = checked(config)
    self.config, self.folder = config, folder
    self.shared = Shared(config, folder, self.domains, self.tasks)

  def held_out(self, seed: int) -> list[Cell]:
    """The combinations that a seed does not train together."""
    return sorted(pairs.diagonal(self.domains, self.tasks, seed))

  def rows(self) -> dict[str, Callable[[], harness.Row]]:
    """Name → what measures it, in an order in which each finds what it goes on from."""
    found: dict[str, Callable[[], harness.Row]] = {BASE: self.as_it_is}
    for seed in self.seeds:
      every: dict[str, Callable[[], harness.Row]] = {}
      for kind in (FIRST, GENERAL, MODULES):
        every[kind] = functools.partial(self.trained, seed, kind)
      for kind in (NO_DOMAIN, NO_TASK, OTHER_DOMAIN):
        every[kind] = functools.partial(self.changed, seed, kind)
      for cell in self.held_out(seed) + self.held_out(seed + 1):
        every[f"{OWN}, {word(cell)}"] = functools.partial(self.trained, seed, OWN, cell)
      for cell in self.held_out(seed):
        every[f"{MIXED}, {word(cell)}"] = functools.partial(self.mixed, seed, cell)
      found |= {f"seed={seed}: {kind}": call for kind, call in every.items()}
    return found

  def as_it_is(self) -> harness.Row:
    """The model without a prefix."""
    documents, found = self.shared.vectors[self.shared.grid.pool], {}
    for cell in self.shared.grid.cells:
      queries = self.shared.vectors[self.shared.grid.rows("validation", cell)[:, 0]]
      found[word(cell)] = self.shared.grid.found(queries, documents, cell)
    return {"kind": BASE, "seed": None, "cells": found}

  def trained(self, seed: int, kind: str, only: Cell | None = None) -> harness.Row:
    """A stage: the general prefix, its modules, or a prefix for one combination.

    The first goes on from random numbers, all others from it, for as many steps.
    """
    params = (
      self.shared.model.start(seed)
      if kind == FIRST
      else self.shared.model.load(self._path(seed, FIRST))
    )
    trains = prefixed.MODULES if kind == MODULES else prefixed.GENERAL
    trains = prefixed.BOTH if (kind, self.config.second) == (MODULES, "all") else trains
    cells = [only] if only else [x for x in self.shared.grid.cells if x not in self.held_out(seed)]
    vectors = self.shared.vectors if self.config.documents == "none" else None
    step, optimizer, steps = self.shared.training
    state = init_state(_copy(params), optimizer, trainable=trains)
    name = f"seed={seed}: {kind}" + (f", {word(only)}" if only else "")
    batches = self._batches(seed, kind, cells, vectors)
    params = train(name, step, state, batches, steps, self.folder)
    row = self._row(seed, kind, params, [only] if only else self.shared.grid.cells)
    if kind in (FIRST, MODULES):
      self.shared.model.save(self._path(seed, kind), params)
    if kind != MODULES:
      return row
    return row | {"tasks": self.tasks, "cosines": self.shared.model.cosines(params)}

  def changed(self, seed: int, kind: str) -> harness.Row:
    """The modules, one of which is left out, or another domain's in its place."""
    return self._row(
      seed, kind, self.shared.model.load(self._path(seed, MODULES)), self.shared.grid.cells
    )

  def mixed(self, seed: int, cell: Cell) -> harness.Row:
    """A weight for each module, learned on one combination: at first 1 for its own, else 0."""
    params = self.shared.model.load(self._path(seed, MODULES))
    own = jnp.zeros(self.shared.model.modules).at[self.shared.grid.attributes(cell)].set(1)
    vectors = self._documents(params, np.arange(len(self.shared.grid.texts)))
    step, optimizer, steps = self.shared.weighing
    state = init_state({"modules": _copy(params), "weights": own}, optimizer, trainable="^weights$")
    batches = self._batches(seed, MIXED, [cell], vectors)
    trained = train(f"seed={seed}: {MIXED}, {word(cell)}", step, state, batches, steps, self.folder)
    places = self.shared.grid.rows("validation", cell)[:, 0]
    queries = encode(
      self.shared.model.weighed, self.shared.model.fold(trained), self.shared.grid.read(places)
    )
    found = self.shared.grid.found(queries, vectors[self.shared.grid.pool], cell)
    return {
      "kind": MIXED,
      "seed": seed,
      "weights": np.asarray(trained["weights"]).tolist(),
      "cells": {word(cell): found},
    }

  def _row(self, seed: int, kind: str, params: Params, cells: Sequence[Cell]) -> harness.Row:
    """What queries of some combinations find; equal ones are encoded once."""
    documents, once, found = self._documents(params, self.shared.grid.pool), {}, {}
    for cell in cells:
      attributes = self._attributes(kind, cell)
      asked = (cell[0], pairs.parts(cell[1])[0], *attributes)
      if asked not in once:
        batch = self.shared.grid.read(self.shared.grid.rows("validation", cell)[:, 0])
        once[asked] = encode(self.shared.model.modular, params, batch, attributes)
      found[word(cell)] = self.shared.grid.found(once[asked], documents, cell)
    return {"kind": kind, "seed": seed, "cells": found}

  def _attributes(self, kind: str, cell: Cell) -> np.ndarray:
    """The modules before a combination's queries."""
    own = self.shared.grid.attributes(cell)
    if kind == OTHER_DOMAIN:
      own[0] = (own[0] + 1) % len(self.domains)
    elif kind in (NO_DOMAIN, NO_TASK):
      own[int(kind == NO_TASK)] = NOTHING
    elif kind != MODULES:
      own[:] = NOTHING
    return own

  def _documents(self, params: Params, places: np.ndarray) -> np.ndarray:
    """The vectors of some texts as documents."""
    if self.config.documents == "none":
      return self.shared.vectors[places]
    return encode(
      self.shared.model.modular, params, self.shared.grid.read(places), np.full(2, NOTHING)
    )

  def _batches(
    self, seed: int, kind: str, cells: Sequence[Cell], vectors: np.ndarray | None
  ) -> Iterator[Batch]:
    rng = np.random.default_rng([seed, ORDERS[kind]])
    options = {"hard": self.config.hard, "modular": kind != MIXED, "vectors": vectors}
    return self.shared.grid.batches(cells, self.config.batch, rng, **options)

  def _path(self, seed: int, kind: str) -> Path:
    return self.folder / "prefixes" / f"{seed} {kind}.safetensors"


def _copy(params: Params) -> Params:
  """The same in arrays of its own, since a step consumes its state."""
  return jax.tree.map(jnp.array, params)
