"""Greedy decoding of SmolLM2-135M against transformers on torch, and against memory bandwidth.

    python -m scripts.benchmarks.decode --rounds=5

One row: 64 tokens of prompt, 128 new ones, caches on both sides. Contenders take turns in one
process and times are medians, so that a busy machine slows all of them. Ours: float32, bfloat16 and
any of `quant.methods()`, one array a layer (`decode.unrolled`) or, where "stacked" or "stacked-"
comes before the name, stacked for the layer scan.
Each token reads every parameter once, so bytes of the parameters over memory bandwidth bounds its
time; the bandwidth is that of summing a large array, measured in turn with the rest. The last line
is one JSON object.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from effjax.core import trees
from effjax.cost.timing import interleaved, medians
from effjax.decode import generate, unrolled
from effjax.models import load
from effjax.models.model import Model
from effjax.quant import methods, quantize

MODEL = flags.DEFINE_string("model", "smollm2-135m", "Name or path of the model.")
PROMPT = flags.DEFINE_integer("prompt", 64, "Tokens of prompt.")
NEW = flags.DEFINE_integer("new", 128, "Tokens to generate.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of interleaved timings.")
THREADS = flags.DEFINE_integer("threads", 2, "Threads of torch; XLA takes all cores it may use.")
VARIANTS = flags.DEFINE_list(
  "variants",
  ["float32", "stacked", "bfloat16", "int8", "stacked-int8dynamic", "stacked-nf4"],
  "Which of ours to time.",
)
PEER = flags.DEFINE_boolean("peer", True, "Time transformers on torch too, where it is installed.")

SUMMED_BYTES = 1 << 29
Contenders = dict[str, Callable[[], list[int] | None]]


def ours(model: Model, variant: str, prompt: np.ndarray) -> tuple[Callable, int]:
  """A call that generates greedily with that variant, and the bytes of its parameters."""
  module, params = model.module, model.params
  form = variant.removeprefix("stacked").lstrip("-")
  if not variant.startswith("stacked"):
    module, params = unrolled(module, params)
  if form == "bfloat16":
    module = module.clone(dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  if form in methods():
    params = quantize(params, method=form)

  def call():
    out = generate(module, params, prompt, max_new_tokens=NEW.value)
    return np.asarray(out.tokens[0]).tolist()

  return call, trees.nbytes(params)


def peer(model: Model, prompt: np.ndarray) -> Callable | None:
  """The same with transformers in float32, or None where torch is missing."""
  try:
    import torch
    import transformers
  except ModuleNotFoundError as error:
    print(f"transformers left out: {error}")
    return None
  import tempfile

  from effjax.models import save

  torch.set_num_threads(THREADS.value)
  with tempfile.TemporaryDirectory() as folder:
    save(model, folder)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  tokens = torch.from_numpy(prompt).long()
  settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
  settings |= {"max_new_tokens": NEW.value, "attention_mask": torch.ones_like(tokens)}

  def call():
    with torch.inference_mode():
      return net.generate(tokens, **settings)[0, PROMPT.value :].tolist()

  return call


def bandwidth() -> Callable:
  """A call that reads SUMMED_BYTES of memory."""
  big = jnp.ones(SUMMED_BYTES // 4)
  total = jax.jit(jnp.sum)
  return lambda: jax.block_until_ready(total(big))


def agreement(found: list[int], expected: list[int]) -> int:
  """How many first tokens are the same."""
  pairs = zip(found, expected, strict=True)
  return next((i for i, (a, b) in enumerate(pairs) if a != b), len(found))


def main(_):
  model = load(MODEL.value)
  vocabulary = model.config.vocab_size
  prompt = np.random.default_rng(0).integers(0, vocabulary, (1, PROMPT.value)).astype(np.int32)
  contenders, sizes, outputs = {"bandwidth": bandwidth()}, {}, {}
  if PEER.value and (call := peer(model, prompt)):
    contenders["transformers"] = call
    sizes["transformers"] = trees.nbytes(model.params)
  for variant in VARIANTS.value:
    contenders[variant], sizes[variant] = ours(model, variant, prompt)
  for name, call in contenders.items():
    start = time.perf_counter()
    outputs[name] = call()
    print(f"{name}: first call {time.perf_counter() - start:.1f} s", flush=True)
  report(medians(interleaved(contenders, ROUNDS.value)), sizes, outputs)


def report(seconds: dict[str, float], sizes: dict[str, int], outputs: dict) -> None:
  """The table, and the JSON object."""
  rate = SUMMED_BYTES / seconds.pop("bandwidth")
  result = {"jax": jax.__version__, "bandwidth_GB_s": round(rate / 1e9, 2)}
  reference = outputs.get("transformers") or next(outputs[name] for name in sizes)
  print(f"{'':14}{'tokens/s':>10}{'of bound':>10}{'MB':>8}{'x peer':>8}{'same tokens':>13}")
  for name, size in sizes.items():
    speed = NEW.value / seconds[name]
    row = {"tokens_s": round(speed, 2), "of_bound": round(speed * size / rate, 3)}
    row["same_tokens"] = agreement(outputs[name], reference)
    if "transformers" in sizes and name != "transformers":
      row["x_transformers"] = round(seconds["transformers"] / seconds[name], 3)
    result[name] = row
    ratio = row.get("x_transformers", "")
    print(
      f"{name:14}{speed:10.1f}{row['of_bound']:10.0%}{size / 1e6:8.0f}{ratio:>8}"
      f"{row['same_tokens']:>13}"
    )
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
