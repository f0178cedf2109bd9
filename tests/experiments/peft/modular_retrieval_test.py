"""The grid of domains and tasks, and a study of a tiny random model on texts made up here."""

import dataclasses

import numpy as np
import pytest

from effjax.data import pairs
from effjax.data.tokenizers import ByteTokenizer
from effjax.train import workdir as files
from experiments.peft import modular_retrieval as study
from experiments.peft.retrieval import findings
from experiments.peft.retrieval.study import BASE, FIRST, GENERAL, MODULES, OWN, Study
from experiments.peft.retrieval.task import NOTHING, Grid, padded, word
from tests.entries import store

TINY = study.Config(
  model="tiny", domains="wordnet,manpages", tasks="define,expand", entries=6, queries=5, length=16,
  prefix=2, batch=4, steps=2, seeds="0",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def texts(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("EFFJAX_CACHE", str(store(tmp_path_factory.mktemp("cache"))))
    yield


@pytest.fixture(scope="module")
def grid():
  sizes = {"train": 6, "validation": 5}
  return Grid(
    ["wordnet", "manpages"], ["define", "expand", "name"], ByteTokenizer(), sizes=sizes, length=16
  )


def test_texts_that_are_too_long_keep_their_last_token():
  tokens, ids = padded(ByteTokenizer(), ["abcdef", "ab"], 4)
  np.testing.assert_array_equal(tokens, [[*b"abcf"], [*b"ab", 0, 0]])
  np.testing.assert_array_equal(ids, [[0] * 4, [0, 0, -1, -1]])


def test_no_text_is_both_trained_on_and_held_out(grid):
  rows = {
    split: [grid.rows(split, cell) for cell in grid.cells] for split in ("train", "validation")
  }
  trained, held_out = ({*np.concatenate(rows[split]).ravel()} for split in rows)
  assert not trained & held_out
  assert {*grid.pool} == held_out and len(grid.pool) == 2 * 5 * 3
  assert sorted(trained | held_out) == list(range(len(grid.texts)))


def test_batches_hold_a_domains_tasks(grid):
  vectors = np.arange(len(grid.texts) * 2.0).reshape(-1, 2)
  cells = [cell for cell in grid.cells if cell != ("wordnet", "expand")]
  batches = grid.batches(cells, 8, np.random.default_rng(0), vectors=vectors, hard=True)
  seen = set()
  for _, batch in zip(range(6), batches, strict=False):
    domains = {*batch["attributes"][:, 0].tolist()}
    assert len(domains) == 1
    seen |= {tuple(x) for x in batch["attributes"].tolist()}
    np.testing.assert_array_equal(batch["documents"], vectors[batch["document_keys"]])
    np.testing.assert_array_equal(batch["tokens"], grid.tokens[batch["keys"]])
    for query, document, ids in zip(
      batch["keys"], batch["document_keys"][:, 0], batch["attributes"], strict=True
    ):
      cell = (grid.domains[ids[0]], grid.tasks[ids[1] - 2])
      assert [query, document] in grid.rows("train", cell)[:, :2].tolist()
  assert seen == {tuple(grid.attributes(cell)) for cell in cells}
  plain = grid.batches(cells, 8, np.random.default_rng(0), vectors=None, hard=False, modular=False)
  batch = next(plain)
  assert batch["document_tokens"].shape == (8, 1, 16) and "attributes" not in batch
  assert (batch["document_attributes"] == NOTHING).all()


def test_what_is_found(grid):
  cell = ("manpages", "name")
  rows = grid.rows("validation", cell)
  documents = np.eye(len(grid.pool))
  where = [list(grid.pool).index(place) for place in rows[:, 1]]
  found = grid.found(documents[where], documents, cell)
  assert found["mrr"] == found["recall@1"] == found["prefers"] == 1
  other = [list(grid.pool).index(place) for place in rows[:, 2]]
  found = grid.found(documents[other] + 0.5 * documents[where], documents, cell)
  assert (found["mrr"], found["mrr of other"], found["prefers"]) == (0.5, 1, 0)
  own = [list(grid.pool).index(place) for place in rows[:, 0]]
  found = grid.found(2 * documents[own] + documents[where], documents, cell)
  assert found["recall@1"] == 1  # the query itself is no answer


def row(kind, seed, **cells):
  measured = lambda x: dict.fromkeys(("mrr", "recall@1", "recall@10", "prefers"), x)
  named = {
    name.replace("_", "/"): measured(x) | {"mrr of other": x / 2} for name, x in cells.items()
  }
  return {"kind": kind, "seed": seed, "cells": named}


def test_means_are_over_what_a_seed_holds_out():
  held_out = {0: [("a", "define")], 1: [("a", "expand")]}
  rows = [row(BASE, None, a_define=0.1, a_expand=0.3, a_name=0.2)]
  for seed, x in ((0, 0.4), (1, 0.6)):
    rows.append(row(GENERAL, seed, a_define=x, a_expand=x, a_name=x))
    rows.append(row(MODULES, seed, a_define=x + 0.1, a_expand=x + 0.2, a_name=x))
  rows += [row(OWN, 0, a_define=0.9), row(OWN, 1, a_expand=0.8), row(OWN, 5, a_name=0.0)]
  found = findings.Findings(rows, held_out)
  assert found.means(BASE, findings.HELD_OUT, "mrr") == [0.1, 0.3]
  np.testing.assert_allclose(found.means(BASE, findings.SEEN, "mrr"), [0.25, 0.15])
  np.testing.assert_allclose(found.means(MODULES, findings.HELD_OUT, "mrr"), [0.5, 0.8])
  np.testing.assert_allclose(
    found.means(findings.OTHER_TASK, findings.HELD_OUT, "mrr"), [0.3, 0.35]
  )
  verdict = found.better(MODULES, GENERAL, findings.HELD_OUT)
  np.testing.assert_allclose(verdict.difference.mean, -0.15)
  assert found.better(OWN, MODULES, findings.HELD_OUT).difference.count == 2
  assert found.better(OWN, MODULES, findings.SEEN) is None
  table = {x["kind"]: x for x in findings.summary(found)}
  assert table[OWN]["held out mrr"] == pytest.approx(0.85) and "seen mrr" not in table[OWN]


def test_siblings_ask_with_the_same_part():
  every = tuple(pairs.TASKS)
  assert findings.sibling("a/b/define", every) == "a/b/expand"
  assert findings.sibling("a/continue", every) == "a/name"
  assert findings.sibling("a/define", ["define", "name"]) is None


def test_likeness_of_modules():
  cosines = np.eye(5) + 0.0
  cosines[2, 4] = cosines[4, 2] = 0.8  # "expand" and "continue", behind two domains
  cosines[2, 3] = cosines[3, 2] = 0.2
  of = {"cosines": cosines.tolist(), "tasks": ["expand", "name", "continue"]}
  assert findings.likeness(of) == pytest.approx((0.8, 0.1))
  assert findings.likeness({}) is None


@pytest.mark.parametrize(
  ("wrong", "words"),
  [
    ({"tasks": "define,nothing"}, "unknown task 'nothing'"),
    ({"tasks": "define"}, "allowed: two or more of each"),
    ({"domains": "wordnet"}, "allowed: two or more of each"),
    ({"domains": "wordnet,austen"}, "domain 'austen' has no entries"),
    ({"documents": "all"}, "documents='all'; allowed: 'none' or 'general'"),
    ({"second": "none"}, "second='none'; allowed: 'modules' or 'all'"),
    ({"batch": 0}, "batch=0; allowed: from 1"),
    ({"rate": 0.0}, "rate=0.0; allowed: above 0"),
    ({"pool": "last"}, "pool='last'"),
    ({"seeds": "x"}, "seeds='x'"),
  ],
)
def test_bad_settings_are_named(wrong, words, tmp_path):
  with pytest.raises(ValueError, match=words):
    study.run(dataclasses.replace(TINY, **wrong), str(tmp_path))


@pytest.mark.slow
def test_a_study_measures_and_resumes(tmp_path):
  rows = study.run(TINY, str(tmp_path))
  assert [x["kind"] for x in rows] == [*findings.KINDS]
  for name in ("config.json", "metrics.jsonl", "provenance.json", "result.csv", "plot.png"):
    assert (tmp_path / name).stat().st_size > 0
  measured = files.read_rows(tmp_path / files.METRICS)
  losses = [x for x in measured if "loss" in x]
  assert len(losses) == 3 + 4 + 2 and all(np.isfinite(x["loss"]) for x in losses)
  assert study.run(TINY, str(tmp_path)) == rows
  assert len(files.read_rows(tmp_path / files.METRICS)) == len(measured)
  # The second stage moves modules, which the first left at 0, and nothing else.
  made = Study(TINY, tmp_path)
  model, first = made.shared.model, made.shared.model.load(made._path(0, FIRST))
  after = model.load(made._path(0, MODULES))
  general = lambda params: params["segments_0"]["layers_0"]["mixer"]["prefix_key"].value
  modules = lambda params: params["segments_0"]["layers_0"]["mixer"]["module_key"].value
  np.testing.assert_array_equal(general(first), general(after))
  assert not np.asarray(modules(first)).any() and np.asarray(modules(after)).any()
  assert not np.array_equal(general(model.start(0)), general(first))
  assert {word(cell) for cell in made.held_out(0)} == {"wordnet/define", "manpages/expand"}
