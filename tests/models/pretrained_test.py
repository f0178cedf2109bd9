"""Real models against transformers on the same files, in float32."""

import argparse
import inspect

import numpy as np
import pytest

from effjax import models
from effjax.models import packages

pytestmark = pytest.mark.slow
WHY_TORCH = "compares with transformers on torch, whose CPU build is installed on Python 3.11 only"
# How many tokens the perplexity is of: more than the 512 that Gemma's local layers see.
WINDOW = {"smollm2-135m": 1024, "gemma3-270m": 576}


@pytest.fixture(scope="module", params=list(WINDOW))
def pair(request, read_once):
  """Name, our model, transformers' of the same GGUF, and the tokens of a text."""
  torch = pytest.importorskip("torch", reason=WHY_TORCH)
  transformers = pytest.importorskip("transformers")
  try:
    path = packages.locate(request.param)
  except ModuleNotFoundError as error:
    pytest.skip(str(error))
  model = models.load(request.param)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  ids = model.tokenizer.encode(inspect.getsource(argparse))[: WINDOW[request.param]]
  return request.param, model, theirs, np.array([ids], np.int32)


def logits_of(theirs, tokens):
  import torch

  with torch.no_grad():
    return theirs(torch.tensor(tokens).long()).logits.numpy()[0]


def perplexity(logits, targets):
  top = logits.max(axis=-1)
  total = np.log(np.exp(logits - top[:, None]).sum(axis=-1)) + top
  return np.exp((total - np.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]).mean())


def test_logits_and_perplexity_equal_those_of_transformers(pair):
  _, model, theirs, tokens = pair
  expected = logits_of(theirs, tokens)
  got = np.asarray(model(tokens))[0]
  assert np.abs(got - expected).max() <= 2e-3
  assert perplexity(got[:-1], tokens[0, 1:]) == pytest.approx(
    perplexity(expected[:-1], tokens[0, 1:]), rel=3e-3
  )


def test_saved_model_reopened_by_transformers_gives_the_same(pair, tmp_path):
  import transformers

  _, model, theirs, tokens = pair
  folder = models.save(model, tmp_path / "saved")
  again = transformers.AutoModelForCausalLM.from_pretrained(folder)
  tokens = tokens[:, :96]
  expected = logits_of(theirs, tokens)
  assert np.abs(logits_of(again, tokens) - expected).max() <= 2e-3
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  text = "def f(x):\n    return x  # 12   34 é"
  assert tokenizer(text)["input_ids"] == model.tokenizer.encode(text)


def test_minilm_hidden_states_and_folder(tmp_path):
  torch = pytest.importorskip("torch", reason=WHY_TORCH)
  transformers = pytest.importorskip("transformers")
  try:
    path = packages.locate("minilm")
  except ModuleNotFoundError as error:
    pytest.skip(str(error))
  model = models.load("minilm")
  theirs = transformers.AutoModel.from_pretrained(path).eval()
  texts = ["A sentence of some length about nothing much at all.", "Short."]
  rows = [model.tokenizer.encode(text) for text in texts]
  width = max(map(len, rows))
  tokens = np.array([row + [model.tokenizer.pad_id] * (width - len(row)) for row in rows], np.int32)
  mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])

  def hidden(network):
    with torch.no_grad():
      out = network(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask))
    return out.last_hidden_state.numpy()[mask == 1]

  expected = hidden(theirs)
  got = np.asarray(model(tokens, segment_ids=np.where(mask, 0, -1)))[mask == 1]
  assert np.abs(got - expected).max() <= 1e-4
  saved = transformers.AutoModel.from_pretrained(models.save(model, tmp_path / "saved"))
  assert np.abs(hidden(saved) - expected).max() <= 1e-5
