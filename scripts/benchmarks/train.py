"""Training speed: tokens a second of a 30M-parameter Llama, against transformers on torch.

    scripts/bench train --batch=4 --length=512 --rounds=5

Both train the same model (same weights at the start, random tokens, float32, AdamW, no dropout) on
the same batches with the same number of threads. They take turns in one process, a step each; the
ratio is the median over rounds of times taken side by side. The last line is one JSON object;
"tokens_per_second_ratio" is ours / theirs.
"""

import json
import os
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from effjax.core import trees
from effjax.cost.timing import interleaved
from effjax.layers.stack import split
from effjax.models import Transformer, presets
from effjax.train import init_state, make_train_step, next_token

BATCH = flags.DEFINE_integer("batch", 4, "Sequences of a batch.")
LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a sequence.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of interleaved steps.")

RATE = 1e-3
HEADS = 6
VOCABULARY, WIDTH, LAYERS, HIDDEN = 24_576, 384, 12, 1024


def ours(config, params, batch):
  """A function that takes a training step and returns its loss."""
  optimizer = optax.adamw(RATE, b2=0.95, weight_decay=0.0)
  step = make_train_step(next_token(Transformer(config)), optimizer)
  carried = [init_state(params, optimizer)]

  def take() -> float:
    carried[0], metrics = step(carried[0], batch, jax.random.key(0))
    return float(metrics["loss"])

  return take


def theirs(config, params, batch):
  """The same, by transformers and torch."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.set_num_threads(os.cpu_count())
  sizes = LlamaConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.width,
    intermediate_size=HIDDEN,
    num_hidden_layers=len(config.layers),
    num_attention_heads=HEADS,
    max_position_embeddings=config.context,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
  )
  model = LlamaForCausalLM(sizes).train()
  model.load_state_dict(_as_llama(config, params), strict=False)
  adamw = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), weight_decay=0.0, fused=True)
  tokens, targets = (
    torch.tensor(np.array(batch[k]), dtype=torch.long) for k in ("tokens", "targets")
  )

  def take() -> float:
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    adamw.step()
    adamw.zero_grad()
    return loss.item()

  return take


def _as_llama(config, params) -> dict:
  import torch

  names = {
    "mixer_norm/scale": "input_layernorm",
    "mixer/query/kernel": "self_attn.q_proj",
    "mixer/key/kernel": "self_attn.k_proj",
    "mixer/value/kernel": "self_attn.v_proj",
    "mixer/out/kernel": "self_attn.o_proj",
    "ffn_norm/scale": "post_attention_layernorm",
    "ffn/gate/kernel": "mlp.gate_proj",
    "ffn/up/kernel": "mlp.up_proj",
    "ffn/down/kernel": "mlp.down_proj",
  }
  layers, rest = split(config, params)
  tensors = {"model.embed_tokens.weight": rest["embed"]["embedding"]}
  tensors["model.norm.weight"] = rest["final_norm"]["scale"]
  for i, layer in enumerate(layers):
    for path, x in trees.items(layer).items():
      tensors[f"model.layers.{i}.{names[path]}.weight"] = x.T
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  return {name: torch.tensor(np.array(x)) for name, x in tensors.items()}


def main(_) -> None:
  config = presets.llama(VOCABULARY, WIDTH, LAYERS, HEADS, hidden=HIDDEN, context=LENGTH.value)
  draw = np.random.default_rng(0)
  tokens = draw.integers(0, VOCABULARY, (BATCH.value, LENGTH.value + 1)).astype(np.int32)
  batch = {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}
  params = jax.jit(Transformer(config).init)(jax.random.key(0), batch["tokens"])["params"]
  print(
    f"{trees.count(params) / 1e6:.1f} M parameters, {BATCH.value} x {LENGTH.value} tokens a step"
  )
  contenders = {"theirs": theirs(config, params, batch), "ours": ours(config, params, batch)}
  for name, take in contenders.items():
    print(f"first two losses, {name}: {take():.5f} {take():.5f}")
  times = interleaved(contenders, ROUNDS.value, patience=float("inf"))
  pairs = zip(times["ours"], times["theirs"], strict=True)
  found = {"tokens_per_second_ratio": statistics.median(b / a for a, b in pairs)}
  for name, taken in times.items():
    found[f"tokens_per_second_{name}"] = BATCH.value * LENGTH.value / statistics.median(taken)
    print(f"{name:7} {statistics.median(taken):7.3f} s a step")
  print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
  app.run(main)
