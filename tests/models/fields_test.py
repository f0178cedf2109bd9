"""Fields of config.json: each is computed with as transformers does, or refused by name."""

import json

import numpy as np
import pytest

from effjax import models
from effjax.models import families
from effjax.models.families.fields import Fields

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 40)).astype(np.int32)
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
  "rope_type": "longrope",
  "short_factor": [1.0, 1.1, 1.2, 1.5],
  "long_factor": [1.0, 2.0, 3.0, 4.0],
  "original_max_position_embeddings": 16,
}
ROPES = {
  "llama3": LLAMA3,
  "yarn": YARN,
  "yarn-all": YARN
  | {"beta_fast": 4.0, "beta_slow": 2.0, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False},
  "yarn-factor": YARN | {"attention_factor": 1.5},
  "longrope": LONG,
  "longrope-factor": LONG | {"factor": 3.0},
  "dynamic": {"rope_type": "dynamic", "factor": 3.0},
}


@pytest.mark.parametrize("case", ROPES)
def test_rotary_scaling_past_the_original_context(case, tiny_folder, reference, tmp_path):
  longest = 16 if case == "dynamic" else 64
  folder, theirs = tiny_folder(
    "llama", max_position_embeddings=longest, rope_scaling=dict(ROPES[case])
  )
  model = models.load(folder)
  # Before the end of the original context, and past it.
  for length in (9, 40):
    got, want = model(TOKENS[:, :length]), reference(theirs, TOKENS[:, :length])
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)
  reopened = type(theirs).from_pretrained(models.save(model, tmp_path / "saved"))
  np.testing.assert_allclose(reference(reopened, TOKENS), want, atol=2e-5, rtol=1e-5)
  assert models.load(tmp_path / "saved").config == model.config


def edited(folder, **fields):
  """The folder with other fields in its config.json; a field that is ... is taken out."""
  path = folder / "config.json"
  config = json.loads(path.read_text()) | fields
  path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
  return folder


REFUSED = {
  "is_causal": ("llama", {"is_causal": False}),
  "add_cross_attention": ("gpt2", {"add_cross_attention": True}),
  "pruned_heads": ("bert", {"pruned_heads": {"0": [1]}}),
  "is_decoder": ("roberta", {"is_decoder": True}),
  "per_layer_config": ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}),
  "quantization_config": ("llama", {"quantization_config": {"quant_method": "gptq"}}),
  "partial_rotary_factor": ("llama", {"partial_rotary_factor": 0.5}),
  "factor": ("llama", {"rope_scaling": {"rope_type": "default", "factor": 4.0}}),
  "attention_factor": (
    "llama",
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0}},
  ),
  "high_freq_factor": ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}),
  "rope_interleaved": ("llama", {"rope_interleaved": True}),
  "use_bidirectional_attention": ("gemma3_text", {"use_bidirectional_attention": True}),
  "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
  "n_ctx": ("gpt2", {"n_ctx": 32}),
  "layer_norm_elementwise_affine": ("opt", {"layer_norm_elementwise_affine": False}),
  "position_embedding_type": ("bert", {"position_embedding_type": "relative_key"}),
  "layer_types": ("mistral", {"layer_types": ["sliding_attention"] * 3}),
  "use_sliding_window": ("qwen2", {"layer_types": ["sliding_attention"] * 3}),
  "use_mrope": ("qwen2", {"use_mrope": True}),
  "lm_head_bias": ("phi3", {"lm_head_bias": True}),
  "hidden_act": ("gemma2", {"hidden_act": "relu"}),
  "attn_logit_softcapping": ("llama", {"attn_logit_softcapping": 30.0}),
  "a_field_of_tomorrow": ("smollm3", {"a_field_of_tomorrow": 1}),
  "vocab_size": ("llama", {"vocab_size": "64"}),
  "rms_norm_eps": ("llama", {"rms_norm_eps": True}),
  "rope_theta": ("llama", {"rope_theta": -1.0, "rope_parameters": ...}),
  "num_attention_heads": ("llama", {"num_attention_heads": 0}),
  "num_key_value_heads": ("llama", {"num_key_value_heads": 3}),
  "num_hidden_layers": ("llama", {"num_hidden_layers": 10_000_000}),
  "rope_scaling": ("llama", {"rope_scaling": [1]}),
  "max_position_embeddings": ("llama", {"max_position_embeddings": 64.5}),
  "architectures": ("llama", {"model_type": ["llama"]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_change_the_computation_are_refused_by_name(name, tiny_folder):
  model_type, fields = REFUSED[name]
  folder = edited(tiny_folder(model_type)[0], **fields)
  wanted = "model_type" if name == "architectures" else name
  with pytest.raises(ValueError, match=rf"config\.json: .*{wanted}"):
    models.load(folder)


HONOURED = {
  "rope_scaling beside rope_parameters": ("llama", {"rope_scaling": LLAMA3 | {"factor": 2.0}}),
  "another name of a field": ("gpt2", {"n_positions": ..., "max_position_embeddings": 64}),
  "rope_scaling of Gemma 3": (
    "gemma3_text",
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
  ),
  "no softcaps": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
  "harmless ones": (
    "llama",
    {"torch_dtype": "bfloat16", "_name_or_path": "x", "pretraining_tp": 2, "temperature": 0.1},
  ),
  "null": ("llama", {"a_field_of_tomorrow": None, "rope_scaling": None, "head_dim": None}),
}


@pytest.mark.parametrize("case", HONOURED)
def test_fields_are_honoured_as_transformers_does(case, tiny_folder, reference):
  model_type, fields = HONOURED[case]
  folder, theirs = tiny_folder(model_type)
  edited(folder, **fields)
  theirs = type(theirs).from_pretrained(folder)
  np.testing.assert_allclose(models.load(folder)(TOKENS), reference(theirs, TOKENS), atol=2e-5)


def test_a_head_unlike_the_token_table_is_used_though_tied(tiny_folder, reference):
  folder, theirs = tiny_folder("llama", tie_word_embeddings=False)
  edited(folder, tie_word_embeddings=True)
  theirs = type(theirs).from_pretrained(folder)
  model = models.load(folder)
  assert not model.config.tied
  np.testing.assert_allclose(model(TOKENS), reference(theirs, TOKENS), atol=2e-5)


def test_gemma3_with_what_a_text_config_must_say(tiny_folder, reference):
  # As published: what is left out stands for the defaults of transformers.
  folder, theirs = tiny_folder("gemma3_text", num_attention_heads=8, num_key_value_heads=4)
  text = {
    name: json.loads((folder / "config.json").read_text())[name]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window")
  }
  text |= {"vocab_size": 64, "head_dim": 16, "query_pre_attn_scalar": 20}
  outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 7}}
  (folder / "config.json").write_text(json.dumps(outer | {"mm_tokens_per_image": 256}))
  model = models.load(folder)
  assert model.config.context == 131_072
  np.testing.assert_allclose(model(TOKENS), reference(theirs, TOKENS), atol=2e-5)
  (folder / "config.json").write_text(json.dumps(outer | {"a_field_of_tomorrow": 1}))
  with pytest.raises(ValueError, match="a_field_of_tomorrow"):
    models.load(folder)


@pytest.mark.parametrize("read", ["integer", "number", "flag", "text", "raw", "numbers"])
@pytest.mark.parametrize(
  "value", [None, [], {}, [None], "x", -1, float("nan"), float("inf"), 10**400, True, [True]]
)
def test_a_value_of_any_type_is_read_or_named(read, value):
  try:
    getattr(Fields("here", {"field": value}), read)("field")
  except ValueError as error:
    assert str(error).startswith("here: ")
    assert "field" in str(error)


def test_what_nobody_read_is_refused():
  fields = Fields("here", {"a": 1, "b": 2, "c": None, "use_cache": True}, {"d": 3})
  assert (fields.integer("a"), fields.integer("d")) == (1, 3)
  with pytest.raises(ValueError, match=r"here: field 'b'=2 is not known"):
    fields.finish()
  assert fields.integer("b") == 2
  fields.finish()


def test_families_have_no_field_that_is_harmless():
  from effjax.models.families.fields import EVERYWHERE
  from effjax.models.families.harmless import CONFIG

  assert not CONFIG & EVERYWHERE.keys()
  assert len(families.FAMILIES) == 18
