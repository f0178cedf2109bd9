"""Tiny random models of every family, made by transformers, and text to tokenise."""

import argparse
import functools
import inspect
import random

import gguf
import numpy as np
import pytest

from effjax import models
from effjax.models import presets
from tests.modules import random_params

WHY_TORCH = "compares with transformers on torch, whose CPU build is installed on Python 3.11 only"

DECODER = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
ENCODER = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}
GEMMA = {"num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 4}
MIXTURE = DECODER | {"num_hidden_layers": 2, "num_experts_per_tok": 2}
FINE: dict[str, int] = {"num_experts": 4, "moe_intermediate_size": 16}
TINY: dict[str, dict] = {
  "llama": DECODER | {"rope_theta": 5000.0},
  "gemma3_text": DECODER | GEMMA | {"num_hidden_layers": 7},
  "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
  "opt": {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
  },
  "bert": ENCODER,
  "roberta": ENCODER | {"type_vocab_size": 1},
  "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
  "mistral": DECODER | {"sliding_window": 4},
  "qwen2": DECODER,
  "qwen3": DECODER | {"head_dim": 12},
  "gemma2": DECODER | GEMMA | {"num_hidden_layers": 4},
  "phi3": DECODER,
  "smollm3": DECODER | {"num_hidden_layers": 5},
  "mixtral": MIXTURE | {"num_local_experts": 4},
  "qwen2_moe": MIXTURE | FINE | {"shared_expert_intermediate_size": 20},
  "qwen3_moe": MIXTURE | FINE | {"head_dim": 12},
  "olmoe": MIXTURE | {"num_experts": 4},
}
ENCODERS = ("bert", "roberta", "distilbert")
VOCABULARY = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A saved random Llama with untied embeddings."""
  config = presets.llama(64, 32, 3, 4, 2, 48, context=64, tied=False)
  module = models.Transformer(config)
  params = random_params(module, np.zeros((1, 1), np.int32))
  model = models.Model(config, module, params)
  return models.save(model, tmp_path_factory.mktemp("loading") / "llama")


def tiny(model_type: str, folder, **fields):
  """Saves a random transformers model to `folder`; gives the model."""
  import torch
  import transformers

  config = transformers.AutoConfig.for_model(
    model_type,
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 64, **TINY[model_type], **fields},
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
  )
  encoder = model_type in ENCODERS
  kind = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
  torch.manual_seed(0)
  model = kind.from_config(config, dtype=torch.float32).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      # Biases and norms begin at 0 and 1, where a wrong table could go unnoticed.
      parameter.add_(0.1 * torch.randn(parameter.shape))
  model.save_pretrained(folder)
  return model


@pytest.fixture
def tiny_folder(tmp_path):
  """A function: saves a random transformers model; gives its folder and the model."""
  pytest.importorskip("torch", reason=WHY_TORCH)

  def make(model_type: str, folder=None, **fields):
    folder = folder or tmp_path / model_type
    return folder, tiny(model_type, folder, **fields)

  return make


@pytest.fixture
def reference():
  """A function: what a transformers model computes for tokens, as a numpy array."""
  torch = pytest.importorskip("torch", reason=WHY_TORCH)

  def compute(model, tokens):
    with torch.no_grad():
      out = model(torch.tensor(tokens).long())
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()

  return compute


@pytest.fixture(scope="session")
def read_once():
  """Of transformers' three readings of a GGUF file's header one, and that from a plain array.

  A slice of a `numpy.memmap` takes three times as long as one of an array, and a header of Gemma's
  has a million.
  """
  mapped = np.memmap

  class Reader(gguf.GGUFReader):
    def __init__(self, *arguments):
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", lambda *args, **named: np.asarray(mapped(*args, **named)))
        super().__init__(*arguments)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gguf, "GGUFReader", functools.lru_cache(1)(Reader))
    yield


@pytest.fixture(scope="session")
def snippets():
  """500 varied texts."""
  rng = random.Random(0)
  code = inspect.getsource(argparse) + inspect.getsource(random)
  pieces = [
    "naïve façade – Zoë, Ångström, ﬁn, e\u0301, ÀÉÎÕÜ ß İi",
    "中文字符與日本語のテキスト、한국어 문장입니다。",
    "🙂👩‍👩‍👧‍👦🇩🇪 ✈️ 👍🏽",
    "مرحبا بالعالم שלום Привет, мир Ελληνικά हिन्दी",
    "1234567890 3.14159 1e-9 0xFF 1,000,000 ½ ² Ⅻ ٣",
    "don't I'LL we've they're it's 'quoted' \"double\"",
    "\n\n\n\r\n\t\t tab\tand\nnewline\r",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><repo_name>x",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<eos><unused1><table><td>[multimodal]",
    "[CLS] masked [MASK] word [SEP][PAD][UNK]",
    "x = {'a': [1, 2], **kw}  # comment\n    return   f(x)[::-1] != y",
    "https://example.org/a?b=c&d=%20#frag user@example.org",
    "\u200b\u00a0\u3000\ufeff zero-width and wide spaces",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ---- ==== ####",
    "supercalifragilisticexpialidocious pneumonoultramicroscopic",
    "\x00\x07\x7f control",
  ]
  spaces = [" " * n for n in (1, 2, 3, 4, 7, 8, 16, 17, 31, 32, 33, 60)]
  out = ["", " ", "\n", *pieces]
  while len(out) < 500:
    start = rng.randrange(len(code) - 300)
    parts = [code[start : start + rng.randrange(1, 300)], rng.choice(pieces), rng.choice(spaces)]
    parts += [rng.choice(pieces)[: rng.randrange(1, 30)], str(rng.randrange(10**6))]
    rng.shuffle(parts)
    out.append("".join(parts[: rng.randrange(1, 6)]))
  return out
