"""Modules of a tiny random model that are put together, and what is claimed of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import peft
from effjax.core import trees
from effjax.train import workdir as files
from experiments.peft import compose_modules as study

TINY = study.Config(
  model="tiny", domains="stdlib,pydoc", rows=1, length=16, batch=1, steps=1, seeds=1
)


def moved(trials, method, rate, seed, task):
  """In place of training, which other tests run: numbers that differ by domain."""
  subject = method(trials.task.subject, jax.random.key(seed))
  base, modules = peft.detach(subject.params)
  step = rate * len(task.corpus.name)
  modules = jax.tree.map(lambda x: x + step * jnp.cos(x.size * jnp.cos(x)), modules)
  return dataclasses.replace(subject, params=peft.attach(base, modules)), [], []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(study.Trials, "trained", moved)
    yield folder, study.run(TINY, str(folder))


@pytest.mark.slow
def test_a_run_reads_every_domain_under_every_combination(finished):
  folder, rows = finished
  combinations = [(row["kind"], row["combination"]) for row in rows]
  alone = ["stdlib", "pydoc"]
  loras = [*alone, *study.COMBINED, *(f"minus {name}" for name in alone)]
  assert combinations[0] == ("–", study.NONE)
  assert combinations[1:] == [
    *((study.LORA, name) for name in loras),
    *((study.PREFIX, name) for name in (*alone, study.SUM, study.MEAN)),
  ]
  measured = files.read_rows(folder / "metrics.jsonl")
  exact = next(row for row in measured if row["kind"] == "exact")
  assert exact["removed loras"] is True and exact["removed prefix"] is True
  assert max(exact["rows"], exact["cat"]) < 1e-4
  assert (folder / "plot.png").exists() and (folder / "domains/pydoc/provenance.json").exists()


@pytest.mark.slow
def test_prefixes_add_what_each_has_moved(finished):
  made = study.Study(TINY, ["stdlib", "pydoc"], finished[0])
  start = study.METHODS[study.PREFIX](made.base, jax.random.key(0))
  values = lambda subject: {
    path: np.asarray(leaf.value) for path, leaf in peft.detach(subject.params)[1].items()
  }
  first, second = (values(made.of_prefixes(0)[name]()) for name in ("stdlib", "pydoc"))
  summed = values(made.of_prefixes(0)[study.SUM]())
  for path, began in values(start).items():
    wanted = began + (first[path] - began) + (second[path] - began)
    np.testing.assert_allclose(summed[path], wanted, atol=1e-6)
    assert (first[path] != began).any()


def test_domains_start_at_factors_of_their_own(finished):
  made = study.Study(TINY, ["stdlib", "pydoc"], finished[0])
  a, b = (made.of_loras(0)[name]().params for name in ("stdlib", "pydoc"))
  for path, leaf in trees.items(a).items():
    if isinstance(leaf, peft.LoRA):
      assert (leaf.a != trees.items(b)[path].a).any()


def rows(kind, **combinations):
  return [
    {"kind": kind, "combination": name, "seed": seed, "nats": dict(zip("xy", nats, strict=True))}
    for name, seeds in combinations.items()
    for seed, nats in enumerate(seeds)
  ]


def test_claims_compare_means_over_domains_by_seed():
  none = {"kind": "", "combination": study.NONE, "seed": None, "nats": {"x": 3.0, "y": 5.0}}
  lora = rows(
    study.LORA,
    x=[(2.0, 5.0), (2.1, 5.0)],
    y=[(3.0, 4.0), (3.0, 4.1)],
    sum=[(2.2, 4.2), (2.31, 4.3)],
    mean=[(2.5, 4.5), (2.6, 4.6)],
    **{"minus x": [(3.5, 5.0), (3.5, 5.0)], "minus y": [(3.0, 5.5), (3.0, 5.5)]},
  )
  found = study.Found([none, *lora])
  assert found.means(study.LORA, "own") == pytest.approx({0: 3.0, 1: 3.1})
  assert found.means(study.LORA, study.OTHERS) == pytest.approx({0: 4.0, 1: 4.0})
  assert found.means(study.LORA, "minus") == pytest.approx({0: 4.5, 1: 4.5})
  assert found.means(study.LORA, study.NONE, ["y"]) == {0: 5.0, 1: 5.0}
  said = {claim: verdict.word for claim, verdict in study.claims([none, *lora]).items()}
  assert said["lora: sum is better than no module"] == "held"
  assert said["lora: sum is better than mean"] == "held"
  assert said["lora: a domain's own is better than sum"] == "held"
  assert "lora: svd is better than mean" not in said
  assert [line["mean"] for line in study.summary([none, *lora])][:2] == pytest.approx([4.0, 3.525])


def test_bad_input_is_named(tmp_path):
  for message, change in {
    "domains='stdlib'; allowed: two or more": {"domains": "stdlib"},
    "steps=0; allowed: from 1": {"steps": 0},
  }.items():
    with pytest.raises(ValueError, match=message):
      study.run(dataclasses.replace(TINY, **change), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
