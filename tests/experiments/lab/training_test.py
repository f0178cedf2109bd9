"""Seeds trained together against one after another, and interrupted against undisturbed."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data import Corpus, Document
from effjax.train import (
  OptimizerConfig,
  init_state,
  make_optimizer,
  make_train_step,
  next_token,
  workdir,
)
from experiments.lab import training
from experiments.lab.sizes import Rung
from experiments.lab.study import Run, Study

RUNG = Rung("tiny", 16, 1, 2, batch=2, learning_rate=3e-2, vocab=280, length=16)
WORDS = ["a cat sat on a mat", "the dog ran", "it rains in spring", "birds sing at dawn"]
SEEDS, STEPS = (0, 3), 6


def corpus() -> Corpus:
  texts = [" ".join(np.random.default_rng(i).choice(WORDS, 30)) for i in range(60)]
  return Corpus("words", [Document("words", str(i), text) for i, text in enumerate(texts)])


def study(folder) -> Study:
  return Study(RUNG, corpus(), tokens_per_parameter=0.1, seeds=SEEDS, folder=folder)


@pytest.fixture
def two_calls(monkeypatch):
  """Six steps are a call of four and one of two; every call has a checkpoint."""
  monkeypatch.setattr(training, "PER_CALL", 4)
  monkeypatch.setattr(training, "PER_CHECKPOINT", 1)
  monkeypatch.setattr(Study, "steps", lambda self, run: STEPS)


def dense(lab: Study):
  """The dense models of all seeds after training."""
  return lab.trained("dense", Run(lab.fresh(lab.dense))).params


def alone(lab: Study, index: int):
  """The parameters of one seed after training by itself, and its losses."""
  subject = lab.fresh(lab.dense).at(index)
  optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-2, warmup=1, steps=STEPS))
  step = make_train_step(next_token(subject.module), optimizer)
  state, losses = init_state(subject.params, optimizer), []
  batches = lab.loaders(0)[SEEDS[index]]
  for _ in range(STEPS):
    state, metrics = step(state, next(batches), jax.random.key(SEEDS[index]))
    losses.append(float(metrics["nll"]))
  return state.params, losses


def test_seeds_together_are_seeds_one_after_another(tmp_path, two_calls):
  lab = study(tmp_path)
  together = dense(lab)
  rows = workdir.read_rows(tmp_path / "trainings/dense/metrics.jsonl")
  for index in range(len(SEEDS)):
    params, losses = alone(lab, index)
    mine = jax.tree.map(lambda x, i=index: x[i], together)
    chex.assert_trees_all_close(mine, params, atol=2e-4)
    np.testing.assert_allclose(rows[-1]["losses"][index], np.mean(losses[4:]), rtol=1e-4)


def test_what_was_interrupted_ends_as_if_it_had_not_been(tmp_path, two_calls, monkeypatch):
  whole = dense(study(tmp_path / "whole"))
  once = training.Orders.__next__

  def stop(self):
    if self.get_state()["done"]:
      raise KeyboardInterrupt
    return once(self)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(training.Orders, "__next__", stop)
    dense(study(tmp_path / "broken"))
  chex.assert_trees_all_equal(dense(study(tmp_path / "broken")), whole)


def test_each_seed_has_its_own_start_and_its_own_order(tmp_path):
  lab = study(tmp_path)
  starts = [jax.tree.leaves(lab.fresh(lab.dense).at(i).params)[0] for i in (0, 1)]
  assert not np.allclose(*starts)
  first, second = (next(loader)["tokens"] for loader in lab.loaders(0).values())
  assert not (first == second).all()
  assert not (first == next(lab.loaders(1)[0])["tokens"]).all()


def test_orders_end_with_the_steps_that_are_left(tmp_path):
  lab = study(tmp_path)
  orders = training.Orders(lab.loaders(0), SEEDS, steps=5, per_call=3)
  calls = [next(orders) for _ in range(len(orders))]
  assert [int(call["count"]) for call in calls] == [3, 2]
  assert calls[1]["tokens"].shape == (3, len(SEEDS), RUNG.batch, RUNG.length)
  seen = np.concatenate([call["tokens"][: call["count"], 1] for call in calls])
  loader = lab.loaders(0)[SEEDS[1]]
  np.testing.assert_array_equal(seen, [next(loader)["tokens"] for _ in range(5)])


def test_rates_are_each_seeds_own(tmp_path):
  params = {"kernel": jnp.ones((2, 3, 3))}
  objective = lambda params, batch, rng: (params["kernel"].sum(), {"nll": batch["x"].sum()})
  state = training.start(params, [0.1, 0.2], 1)
  batch = {"x": jnp.ones((1, 2, 1)), "count": jnp.int32(1)}
  state, metrics = training.program(objective, 1, SEEDS)(state, batch, jax.random.key(0))
  moved = 1 - state.extra.params["kernel"][:, 0, 0]
  # Adam's first step is the sign of the gradient, and a tenth of the matrix decays.
  np.testing.assert_allclose(moved, [0.1 * 1.1, 0.2 * 1.1], rtol=1e-3)
  assert metrics["losses"].tolist() == [1.0, 1.0]


def test_what_is_watched_is_the_mean_of_a_call_by_seed_and_what_ends_a_step_is_done_for_each():
  params = {"kernel": jnp.zeros((2, 1)), "counter": jnp.zeros((2, 1))}
  seen = lambda batch: {"nll": batch["x"].mean(), "here/load": batch["x"], "other": batch["x"]}
  objective = lambda params, batch, rng: (params["kernel"].sum(), seen(batch))
  count = lambda old, metrics: old + metrics["here/load"].sum()
  after = lambda state, metrics: dataclasses.replace(
    state, params=state.params | {"counter": count(state.params["counter"], metrics)}
  )
  x = np.arange(12.0, dtype=np.float32).reshape(3, 2, 2)  # of the third step nothing is used
  step = training.program(objective, 1, SEEDS, after=after, watch="load$")
  batch = {"x": x, "count": jnp.int32(2)}
  state, metrics = step(training.start(params, [0.1, 0.1], 1), batch, jax.random.key(0))
  assert set(metrics) == {"loss", "losses", "finite", "here/load"}
  np.testing.assert_allclose(metrics["here/load"], x[:2].mean(axis=0))
  np.testing.assert_allclose(metrics["losses"], x[:2].mean(axis=(0, 2)))
  # Its own gradient is zero and it is no matrix, so that only what ends a step moves it.
  np.testing.assert_allclose(state.extra.params["counter"][:, 0], x[:2].sum(axis=(0, 2)))
