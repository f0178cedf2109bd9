import dataclasses
import json

import numpy as np
import pytest

from effjax.train.workdir import claim
from experiments.train import pretrain

TINY = pretrain.Config(
  tokenizer="byte", width=16, heads=2, kv_heads=1, hidden=16, depth=2, length=16, batch=8,
  steps=4, warmup=1, checkpoint_every=2, evaluate_every=2, evaluate_rows=8, window=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A folder of small texts, some of them held out."""
  folder = tmp_path_factory.mktemp("text")
  draw = np.random.default_rng(0)
  for i in range(60):
    (folder / f"{i}.txt").write_text(" ".join(draw.choice(["one", "two", "three", "four"], 60)))
  return f"path:{folder}"


def test_a_run_writes_everything_and_is_not_repeated(text, tmp_path):
  config = dataclasses.replace(TINY, text=text, pattern="window+mlp,attention+moe", experts=2)
  (row,) = pretrain.run(config, str(tmp_path))
  assert row["tokens"] == 4 * 8 * 16 and row["perplexity"] > 1
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [r["step"] for r in rows] == [1, 2, 3, 4] and "load_balance" in rows[0]
  for name in ("config.json", "result.csv", "plot.png"):
    assert (tmp_path / name).stat().st_size > 0
  assert pretrain.run(config, str(tmp_path)) == [row]


def test_a_workdir_of_another_config_is_refused(text, tmp_path):
  claim(tmp_path, dataclasses.replace(TINY, text=text, steps=1))
  with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
    pretrain.run(dataclasses.replace(TINY, text=text, steps=1, seed=1), str(tmp_path))


@pytest.mark.slow
def test_devices_give_what_one_gives(text, tmp_path):
  one = pretrain.run(dataclasses.replace(TINY, text=text), str(tmp_path / "one"))[0]
  many = dataclasses.replace(TINY, text=text, devices=8, zero=3)
  other = pretrain.run(many, str(tmp_path / "many"))[0]
  assert one.pop("pattern") == other.pop("pattern")
  assert other == pytest.approx(one, rel=1e-4)


def test_patterns():
  config = dataclasses.replace(TINY, pattern="window+mlp*5,attention+mlp", depth=8)
  layers = pretrain.architecture(config, 300).layers
  assert [layers.index(layer) for layer in layers] == [0, 0, 0, 0, 0, 5, 0, 0]


@pytest.mark.parametrize(
  "wrong, words",
  [
    ({"pattern": "mamba+mlp"}, r"pattern: 'mamba\+mlp'; allowed.*attention, window.*mlp, moe"),
    ({"pattern": "attention"}, "MIXER"),
  ],
)
def test_wrong_patterns_are_named(wrong, words):
  with pytest.raises(ValueError, match=words):
    pretrain.architecture(dataclasses.replace(TINY, **wrong), 300)


@pytest.mark.parametrize(
  "wrong, words",
  [
    ({"dtype": "int8"}, "dtype='int8'"),
    ({"devices": 16}, "16 CPU devices are asked for"),
    ({"devices": 3}, "batch of 8 rows; allowed: multiples of data=3"),
    ({"devices": 8, "zero": 5}, "zero=5"),
    ({"microbatches": 3}, "microbatches=3 does not divide"),
    ({"text": "no such text"}, "no such text"),
  ],
)
def test_wrong_values_are_named(text, tmp_path, wrong, words):
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    pretrain.run(dataclasses.replace(TINY, **{"text": text, **wrong}), str(tmp_path))
