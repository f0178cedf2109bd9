import jax
import jax.numpy as jnp
import pytest

from effjax.attention import LinearAttention
from effjax.cost import memory
from effjax.cost.compiled import compiled
from effjax.layers import LayerSpec, TransformerConfig
from effjax.models import Transformer, presets

# Gigabytes a device, ZeRO Table 1; columns 7.5 B, 128 B and 1 T, each for stages 1, 2 and 3. The
# published 7.5 B figures are rounded and the others cut off, so a cell agrees within one unit of
# its last printed digit.
TABLE = {
  1: "120 120 120  2048 2048 2048  16000 16000 16000",
  4: "52.5 41.3 30  896 704 512  7000 5500 4000",
  16: "35.6 21.6 7.5  608 368 128  4750 2875 1000",
  64: "31.4 16.6 1.88  536 284 32  4187 2218 250",
  256: "30.4 15.4 0.47  518 263 8  4046 2054 62.5",
  1024: "30.1 15.1 0.12  513 257 2  4011 2013 15.6",
}
SIZES = (7.5e9, 128e9, 1e12)
CELLS = [
  (SIZES[i // 3], dp, i % 3 + 1, cell)
  for dp, row in TABLE.items()
  for i, cell in enumerate(row.split())
]


@pytest.mark.parametrize(("parameters", "dp", "stage", "published"), CELLS)
def test_every_cell_of_the_zero_table(parameters, dp, stage, published):
  digits = len(published.partition(".")[2])
  computed = memory.zero_memory(parameters, dp, stage) / 1e9
  assert abs(computed - float(published)) <= 10**-digits + 1e-9


def test_two_cells_the_paper_cut_off():
  assert memory.zero_memory(1e12, 64, 1) / 1e9 == 4187.5
  assert memory.zero_memory(1e12, 64, 2) / 1e9 == 2218.75


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("mode", ["paper", "framework"])
def test_one_device_holds_sixteen_bytes_a_parameter(stage, mode):
  assert memory.vram(1000, stage=stage, mode=mode).state == 16_000


def test_lecture_example_of_7b():
  found = memory.vram(7e9, activations=1e9, buffers=2e9)
  assert (found.weights, found.gradients, found.optimizer) == (14e9, 14e9, 84e9)
  assert found.total == 115e9


def test_stages_shard_optimizer_then_gradients_then_weights():
  held = [memory.vram(8, dp=8, stage=stage) for stage in range(4)]
  assert [(m.weights, m.gradients, m.optimizer) for m in held] == [
    (16, 16, 96),
    (16, 16, 12),
    (16, 2, 12),
    (2, 2, 12),
  ]


def test_activations_of_gpt3_match_the_published_formula():
  # arXiv 2205.05198 gives 34 + 5as/h bytes an element; GPT-3: a=96, s=2048, h=12288, so 34 + 80.
  element = 2048 * 12288
  assert memory.transformer_activations(1, 2048, 12288, 96, 1) == element * (34 + 80)
  assert memory.transformer_activations(1, 2048, 12288, 96, 3, recompute="full") == 6 * element


@pytest.mark.usefixtures("optimized")
def test_residuals_agree_with_what_a_compiled_forward_returns():
  def loss(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]

  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  params, x = {"a": shape(8, 16), "b": shape(16, 4)}, shape(32, 8)
  forward = lambda params, x: jax.vjp(lambda p: loss(p, x), params)[1]
  outputs = compiled(forward, params, x).outputs
  # x and b are arguments passed through, tanh's output and its derivative [32, 16] are computed.
  assert memory.residual_bytes(loss, params, x) == pytest.approx(outputs, abs=200)


def test_remat_keeps_less():
  def block(w, x):
    for _ in range(4):
      x = jnp.tanh(x @ w)
    return x.sum()

  w, x = jnp.ones((8, 8)), jnp.ones((64, 8))
  plain = memory.residual_bytes(block, w, x)
  assert memory.residual_bytes(jax.checkpoint(block), w, x) < plain / 3


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: memory.zero_memory(1, 0, 1), "dp 0"),
    (lambda: memory.zero_memory(1, 8, 4), "stage 4"),
    (lambda: memory.vram(1, mode="x"), "mode 'x'"),
    (lambda: memory.transformer_activations(1, 1, 1, 1, 1, recompute="x"), "recompute 'x'"),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_bytes_of_a_cache_are_those_of_its_arrays():
  module = Transformer(presets.TINY, jnp.bfloat16)
  cache = module.init_cache(2, 32)
  assert memory.cache_bytes(module, 2, 32) == sum(x.nbytes for x in jax.tree.leaves(cache))
  layers, kv_heads, head_width = 2, 2, 16
  slot = 2 * kv_heads * head_width * 2 + 1  # and whether it was written
  assert memory.cache_bytes(module, 2, 32) == 2 * (layers * 32 * slot + 4)  # and where a row ends
  small = 2 * kv_heads * (head_width + 4) + 1  # a byte an entry, and a scale a head
  assert memory.cache_bytes(module, 2, 32, dtype="int8") == 2 * (layers * 32 * small + 4)


def test_bytes_of_a_state_do_not_grow_with_the_length():
  config = TransformerConfig(16, 8, (LayerSpec(LinearAttention(2), None),) * 3)
  module = Transformer(config)
  state = 2 * (4 * 4 + 4) * 4 + 4  # two heads 4 wide in float32, and the segment
  row = 3 * state + 4  # and where it ends
  assert memory.cache_bytes(module, 5, 8) == memory.cache_bytes(module, 5, 2048) == 5 * row


@pytest.mark.parametrize(("sizes", "message"), [((0, 8), "batch 0"), ((1, 0), "length 0")])
def test_bytes_of_no_cache(sizes, message):
  with pytest.raises(ValueError, match=f"{message}; allowed: from 1"):
    memory.cache_bytes(Transformer(presets.TINY), *sizes)
  with pytest.raises(ValueError, match="allowed: up to 256"):
    memory.cache_bytes(Transformer(presets.TINY), 1, 257)
