"""Mixtures of experts under data parallelism: what one of eight devices computes and holds.

    scripts/bench moe_parallel --batch=64 --length=128

A Transformer whose feed-forward layers are mixtures of experts gives loss and gradients for one
batch: on one device; on eight simulated ones with the split of rows left to XLA ("compiler"); and
as the training step does it, for stages of ZeRO. From the compiled programs: the rows that the
experts of one device compute, its temporaries, and the collectives. Each device should have an
eighth of both. What a program holds of whole weights and gradients does not shrink with the number
of devices, so sizes are such that activations dominate; the weights' bytes are printed beside. The
last line is one JSON object: rows and temporaries over those of one device alone, and the largest
differences of loss and gradients from its.
"""

import collections
import contextlib
import json
import re

import jax
import numpy as np
from absl import app, flags

from effjax import cost
from effjax.attention import Attention
from effjax.core import trees
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.models import Transformer
from effjax.moe import MoE, TopK
from effjax.parallel import Zero, make_mesh, simulate_devices
from effjax.train import next_token

BATCH = flags.DEFINE_integer("batch", 64, "Sequences of a batch.")
LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a sequence.")

DEVICES, VOCABULARY, WIDTH, HIDDEN, EXPERTS, CHOICES, LAYERS = 8, 256, 64, 96, 8, 2, 2
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def make_module() -> Transformer:
  ffn = MoE(TopK(EXPERTS, CHOICES), MLP(HIDDEN, "silu", gated=True))
  return Transformer(TransformerConfig(VOCABULARY, WIDTH, (LayerSpec(Attention(4), ffn),) * LAYERS))


def make_program(placement: Zero, split: bool):
  """A jitted (params, batch) → (loss, gradients) under a placement."""
  objective = next_token(make_module())

  @jax.jit
  def program(params, batch):
    batch = placement.on_batch(batch)
    loss = lambda params: objective(placement.on_params(params), batch, None)[0]
    with placement.scope() if split else contextlib.nullcontext():
      value, grads = jax.value_and_grad(loss)(params)
    return value, placement.on_gradients(grads)

  return program


def measure(devices: int, zero: int, split: bool) -> tuple[dict, tuple]:
  """Figures of the program for one device, and (loss, gradients)."""
  placement = Zero(make_mesh(devices=jax.devices()[:devices], data=devices), zero)
  program = make_program(placement, split)
  tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH.value, LENGTH.value + 1))
  batch = {"tokens": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
  params = jax.jit(make_module().init)(jax.random.key(0), batch["tokens"][:1])["params"]
  params = jax.device_put(params, placement.params(params))
  batch = jax.device_put(batch, placement.batch(batch))
  text = program.lower(params, batch).compile().as_text()
  figures = {
    "rows": max(int(rows) for rows in re.findall(rf"\[(\d+),{HIDDEN}\]", text)),
    "temporaries": cost.compiled(program, params, batch).temporaries,
    "weights": trees.nbytes(params),
    "collectives": dict(collections.Counter(re.findall(rf"\b({COLLECTIVES})(?:-start)?\(", text))),
  }
  return figures, jax.device_get(program(params, batch))


def compare(figures: dict, result: tuple, one: dict, expected: tuple) -> dict[str, float]:
  """Shares of what one device has, and differences from what it computes."""
  differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), result, expected)
  return {
    "rows": round(figures["rows"] / one["rows"], 4),
    "temporaries": round(figures["temporaries"] / one["temporaries"], 4),
    "loss_difference": differences[0],
    "gradient_difference": max(jax.tree.leaves(differences[1])),
  }


def main(_) -> None:
  simulate_devices(DEVICES)
  jax.config.update("jax_enable_compilation_cache", False)
  cases = {"one": (1, 0, False), "compiler": (DEVICES, 0, False)}
  cases |= {f"zero{stage}": (DEVICES, stage, True) for stage in (0, 2, 3)}
  measured: dict[str, tuple[dict, tuple]] = {}
  found: dict[str, float] = {}
  print(f"{'':10} {'rows':>8} {'temporaries':>12} {'weights':>9}  collectives")
  for name, case in cases.items():
    figures, _ = measured[name] = measure(*case)
    numbers = "{rows:8} {temporaries:12,} {weights:9,}".format(**figures)
    print(f"{name:10} {numbers}  {figures['collectives'] or '–'}", flush=True)
    if name != "one":
      compared = compare(*measured[name], *measured["one"])
      found |= {f"{name}_{key}": value for key, value in compared.items()}
  print(json.dumps(found))


if __name__ == "__main__":
  app.run(main)
