"""Mixtures of experts on eight devices: what one of them computes and holds.

    scripts/bench moe_parallel --batch=64 --length=128

A Transformer whose feed-forward layers are mixtures of experts gives loss and gradients for one
batch: on one device; on eight simulated ones with the split of rows left to XLA ("compiler"); as
the training step does it, for stages of ZeRO; and with the experts split over the devices too, with
room between them for all tokens ("experts") and for three times the mean ("room").

From the compiled programs: the rows for which the experts of one device have a place, the most
experts whose weights it has in one array, its temporaries, and the collectives. Under data
parallelism each device should have an eighth of the rows and all experts, under expert parallelism
one expert; what it computes are then the rows that its expert was given, however many places there
are. "busiest" is the share of all rows that the busiest device computes, "dropped" that of the
choices which found no room. What a program holds of whole weights and gradients does not shrink
with the number of devices, so sizes are such that activations dominate; the bytes of weights that a
device holds are printed beside. The last line is one JSON object: all of it over what one device
alone has, and the largest differences of loss and gradients from its.
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
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.layers.axes import axes
from effjax.models import Transformer
from effjax.moe import MoE, TopK
from effjax.parallel import Experts, Zero, make_mesh, simulate_devices
from effjax.train import next_token

BATCH = flags.DEFINE_integer("batch", 64, "Sequences of a batch.")
LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a sequence.")

DEVICES, VOCABULARY, WIDTH, HIDDEN, EXPERTS, CHOICES, LAYERS = 8, 256, 64, 96, 8, 2, 2
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def make_module() -> Transformer:
  ffn = MoE(TopK(EXPERTS, CHOICES), MLP(HIDDEN, "silu", gated=True))
  return Transformer(TransformerConfig(VOCABULARY, WIDTH, (LayerSpec(Attention(4), ffn),) * LAYERS))


def make_program(placement: Zero, split: bool):
  """A jitted (params, batch) → (loss, gradients, metrics) under a placement."""
  objective = next_token(make_module())

  @jax.jit
  def program(params, batch):
    batch = placement.on_batch(batch)
    loss = lambda params: objective(placement.on_params(params), batch, None)
    with placement.scope() if split else contextlib.nullcontext():
      (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, placement.on_gradients(grads), metrics

  return program


def placements() -> dict[str, tuple[Zero, bool]]:
  """Name → placement, and whether the split of rows is its or the compiler's."""
  over = lambda devices, zero: Zero(make_mesh(devices=jax.devices()[:devices], data=devices), zero)
  dealt = lambda room: Zero(
    make_mesh(data=1, expert=DEVICES), 3, experts=Experts(axes(make_module().config), room=room)
  )
  cases = {"one": (over(1, 0), False), "compiler": (over(DEVICES, 0), False)}
  cases |= {f"zero{stage}": (over(DEVICES, stage), True) for stage in (0, 2, 3)}
  return cases | {"experts": (dealt(None), True), "room": (dealt(3.0), True)}


def measure(placement: Zero, split: bool) -> tuple[dict, tuple]:
  """Figures of the program for one device, and (loss, gradients)."""
  program = make_program(placement, split)
  tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH.value, LENGTH.value + 1))
  batch = {"tokens": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
  params = jax.jit(make_module().init)(jax.random.key(0), batch["tokens"][:1])["params"]
  params = jax.device_put(params, placement.params(params))
  batch = jax.device_put(batch, placement.batch(batch))
  text = program.lower(params, batch).compile().as_text()
  kernels = rf"\[(\d+),(?:{WIDTH},{HIDDEN}|{HIDDEN},{WIDTH})\]"
  figures = {
    "rows": max(int(rows) for rows in re.findall(rf"\[(\d+),{HIDDEN}\]", text)),
    "experts": max((int(experts) for experts in re.findall(kernels, text)), default=1),
    "temporaries": cost.compiled(program, params, batch).temporaries,
    "weights": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)),
    "collectives": dict(collections.Counter(re.findall(rf"\b({COLLECTIVES})(?:-start)?\(", text))),
  }
  *result, metrics = jax.device_get(program(params, batch))
  busiest = metrics["max_load"] / EXPERTS if placement.experts else 1 / placement.shards.count
  dropped = metrics.get("exchange_dropped", 0.0)
  return figures | {"busiest": float(busiest), "dropped": float(dropped)}, tuple(result)


def compare(figures: dict, result: tuple, one: dict, expected: tuple) -> dict[str, float]:
  """Shares of what one device has, and differences from what it computes."""
  differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), result, expected)
  shares = ("rows", "experts", "temporaries", "weights")
  return {name: round(figures[name] / one[name], 4) for name in shares} | {
    "busiest": round(figures["busiest"], 4),
    "dropped": round(figures["dropped"], 4),
    "loss_difference": differences[0],
    "gradient_difference": max(jax.tree.leaves(differences[1])),
  }


def main(_) -> None:
  simulate_devices(DEVICES)
  jax.config.update("jax_enable_compilation_cache", False)
  measured: dict[str, tuple[dict, tuple]] = {}
  found: dict[str, float] = {}
  heads = f"{'':10} {'rows':>8} {'busiest':>7} {'dropped':>7} {'experts':>7} {'temporaries':>12}"
  print(f"{heads} {'weights':>9}  collectives")
  for name, case in placements().items():
    figures, _ = measured[name] = measure(*case)
    numbers = (
      "{rows:8} {busiest:7.3f} {dropped:7.3f} {experts:7} {temporaries:12,} {weights:9,}".format(
        **figures
      )
    )
    print(f"{name:10} {numbers}  {figures['collectives'] or '–'}", flush=True)
    if name != "one":
      compared = compare(*measured[name], *measured["one"])
      found |= {f"{name}_{key}": value for key, value in compared.items()}
  print(json.dumps(found))


if __name__ == "__main__":
  app.run(main)
