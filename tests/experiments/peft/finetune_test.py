"""Fine-tuning a tiny random model on files: what comes out opens again and computes the same."""

import dataclasses

import jax
import numpy as np
import pytest

from effjax import models, peft
from effjax.core import trees
from effjax.core.weights import materialize
from effjax.models import Model
from experiments.lab.subject import load
from experiments.peft import finetune
from experiments.peft.methods import METHODS
from experiments.quant.schemes import SCHEMES

TINY = finetune.Config(
  model="tiny", length=16, batch=2, steps=4, learning_rate=1e-2, rows=2,
  evaluate_every=2, checkpoint_every=2, prompt="one two", new_tokens=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  draw = np.random.default_rng(0)
  for i in range(60):
    (folder / f"{i}.txt").write_text(" ".join(draw.choice(["one", "two", "three", "four"], 20)))
  return f"path:{folder}"


def test_adapters_and_the_merged_model_are_what_was_trained(text, tmp_path):
  config = dataclasses.replace(TINY, text=text, method="rslora", base="bfloat16")
  (row,) = finetune.run(config, str(tmp_path))
  assert row["loss"] < row["loss before"] and row["trained"] == 19_456
  base = finetune.HALF(load("tiny")[0], None, None)
  model = Model(base.config, base.module, base.params)
  adapted = peft.load(model, tmp_path / "adapters")
  merged = trees.items(peft.merge(adapted.params))
  stored = trees.items(models.load(tmp_path / "model").params)
  for path, w in trees.items(base.params).items():
    np.testing.assert_array_equal(stored[path].astype(float), merged[path].astype(float), path)
    assert path.endswith("kernel") == bool((merged[path] != w).any())
  before, after = (finetune.files.read_json(tmp_path / f"{x}.json") for x in ("before", "after"))
  assert before["loss"] == row["loss before"] and after["loss"] == row["loss"]
  steps = finetune.files.read_rows(tmp_path / "metrics.jsonl")
  assert [s["step"] for s in steps] == [1, 2, 3, 4] and "validation_loss" in steps[1]
  assert (tmp_path / "plot.png").stat().st_size and (tmp_path / "result.csv").stat().st_size
  assert finetune.run(config, str(tmp_path)) == [row]


def test_what_no_matrix_holds_has_no_merged_model(tmp_path, capsys):
  base = SCHEMES["nf4"](load("tiny")[0], None, None)
  for name in ("soft-prompt", "prefix", "houlsby", "lora-experts"):
    made = METHODS[name](base, jax.random.key(0))
    finetune.export(Model(made.config, made.module, made.params), tmp_path / name)
    assert "no merged model: " in capsys.readouterr().out
    assert not (tmp_path / name / "model").exists()
    assert list((tmp_path / name / "adapters").iterdir())


def test_merged_models_of_few_bits_are_plain(tmp_path):
  base = SCHEMES["nf4"](load("tiny")[0], None, None)
  made = METHODS["ia3"](base, jax.random.key(0))
  finetune.export(Model(made.config, made.module, made.params), tmp_path)
  stored = trees.items(models.load(tmp_path / "model").params)
  for path, w in trees.items(base.params).items():
    np.testing.assert_array_equal(stored[path], materialize(w), path)


@pytest.mark.parametrize(
  "wrong, words",
  [
    ({"method": "lroa"}, "method='lroa'; allowed: lora, rslora"),
    ({"base": "int3"}, "base='int3'; allowed: float32, .*bfloat16"),
    ({"method": "bitfit"}, "method='bitfit' does not suit: .*no bias.*; methods that do: lora, "),
    (
      {"method": "pissa", "base": "nf4"},
      "PiSSA over NF4.*methods that do: lora, rslora, dora, lora-",
    ),
    ({"method": "full", "base": "int8"}, "is a Int8, which does not train"),
    ({"model": "minilm"}, "allowed: decoders"),
    ({"text": "no such text"}, "no such text"),
    ({"length": 500}, "length 500"),
    ({"learning_rate": -1.0}, "learning_rate"),
  ],
)
def test_wrong_values_are_named(text, tmp_path, wrong, words):
  with pytest.raises(ValueError, match=words):
    finetune.run(dataclasses.replace(TINY, **{"text": text, **wrong}), str(tmp_path))
