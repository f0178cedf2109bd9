"""Fields of tokenizer_config.json and its like: ids as transformers', or refused by name."""

import json

import pytest
import tokenizers as hf

from effjax.models import tokenizers
from tests.models.tokenizers_test import MERGES, TOKENS

TEXTS = [
  "hello",
  " hello  hello",
  "hello<|end|>é<|new|> x",
  "Ünï Straße CAFÉ",
  "中文 字 a\u2028b",
  "<unk>hell <mask>o",
  "",
]
MORE = [*TOKENS, "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>"]
SPECIAL = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
NEW = {"content": "<|new|>", "lstrip": False, "normalized": False, "rstrip": True}


def merges_folder(folder, config, **files):
  (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(MORE)}))
  lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n")
  return described(folder, config, **files)


def described(folder, config, **files):
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


def assert_ids_of(cls, folder, saved):
  transformers = pytest.importorskip("transformers")
  theirs, ours = getattr(transformers, cls).from_pretrained(folder), tokenizers.from_folder(folder)
  saved.mkdir()
  ours.save(saved)
  again = tokenizers.from_folder(saved)
  reopened = transformers.AutoTokenizer.from_pretrained(saved)
  for text in TEXTS:
    ids = theirs(text)["input_ids"]
    assert ours.encode(text) == ids, text
    assert again.encode(text) == ids
    assert reopened(text)["input_ids"] == ids
  return ours


GPT2 = {
  "no fields": {},
  "add_bos_token": SPECIAL | {"add_bos_token": True},
  "add_eos_token": SPECIAL | {"add_eos_token": True},
  "add_prefix_space": SPECIAL | {"add_prefix_space": True},
  "unk_token": SPECIAL | {"unk_token": "<unk>"},
  "added_tokens_decoder": SPECIAL | {"added_tokens_decoder": {str(len(MORE)): NEW}},
  "a special one": SPECIAL
  | {"added_tokens_decoder": {str(len(MORE)): NEW | {"special": True}}, "mask_token": "<mask>"},
  "additional_special_tokens": SPECIAL | {"additional_special_tokens": ["<|new|>", "<pad>"]},
  "split_special_tokens": SPECIAL | {"split_special_tokens": True},
  "harmless": SPECIAL | {"model_max_length": 7, "errors": "replace", "image_token_id": 3},
}


@pytest.mark.parametrize("case", GPT2)
def test_fields_of_a_folder_with_merges(case, tmp_path):
  folder = merges_folder(tmp_path, GPT2[case])
  assert_ids_of("GPT2Tokenizer", folder, tmp_path / "saved")


def test_added_tokens_of_a_file(tmp_path):
  folder = merges_folder(tmp_path, SPECIAL, added_tokens={"<|new|>": len(MORE)})
  assert_ids_of("GPT2Tokenizer", folder, tmp_path / "saved")


@pytest.mark.parametrize("cls", ["RobertaTokenizer", "Qwen2Tokenizer"])
def test_classes_of_folders_with_merges(cls, tmp_path):
  folder = merges_folder(tmp_path, {"tokenizer_class": cls})
  ours = assert_ids_of(cls, folder, tmp_path / "saved")
  assert ours.eos_id == MORE.index("</s>" if cls == "RobertaTokenizer" else "<|endoftext|>")


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hell", "##o", "cafe", "café", "CAFE"]
BERT_WORDS += ["Cafe", "CAFÉ", "中", "文", "##文", "中文", "x\u2028y", "<", "a", "b", "ab"]


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True},
    {"strip_accents": False},
    {"tokenize_chinese_chars": False},
  ],
)
def test_fields_of_a_folder_with_words(fields, tmp_path):
  (tmp_path / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n", "utf-8")
  assert_ids_of("BertTokenizer", described(tmp_path, fields), tmp_path / "saved")
  # The same where a tokenizer.json says otherwise.
  plain = tokenizers.wordpiece({word: i for i, word in enumerate(BERT_WORDS)})
  (tmp_path / "vocab.txt").unlink()
  plain.backend.save(str(tmp_path / "tokenizer.json"))
  described(tmp_path, fields | {"tokenizer_class": "BertTokenizer"})
  assert_ids_of("BertTokenizer", tmp_path, tmp_path / "again")


@pytest.mark.parametrize(
  "fields", [{"add_eos_token": True}, {"add_bos_token": False}, {"add_bos_token": True}, {}]
)
def test_fields_beside_a_tokenizer_json(fields, tmp_path):
  backend = tokenizers.from_folder(merges_folder(tmp_path, SPECIAL)).backend
  end = ("<|end|>", backend.token_to_id("<|end|>"))
  backend.post_processor = hf.processors.TemplateProcessing("$A <|end|>", special_tokens=[end])
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / name).unlink()
  backend.save(str(tmp_path / "tokenizer.json"))
  described(tmp_path, SPECIAL | fields | {"tokenizer_class": "PreTrainedTokenizerFast"})
  assert_ids_of("AutoTokenizer", tmp_path, tmp_path / "saved")


def test_every_field_is_kept(tmp_path):
  config = SPECIAL | {"model_max_length": 7, "padding_side": "left", "chat_template": "{{ x }}"}
  config |= {"added_tokens_decoder": {str(len(MORE)): NEW}, "image_token_id": 5}
  tokenizer = tokenizers.from_folder(merges_folder(tmp_path, config))
  (tmp_path / "saved").mkdir()
  tokenizer.save(tmp_path / "saved")
  saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
  assert {name: saved[name] for name in config} == config


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow"),
    ({"do_basic_tokenize": False}, "do_basic_tokenize=False"),
    ({"tokenizer_class": "T5Tokenizer"}, "tokenizer_class='T5Tokenizer'; allowed: GPT2Tokenizer"),
    ({"add_bos_token": "yes"}, "add_bos_token='yes'; allowed: true, false"),
    ({"added_tokens_decoder": {"9000": NEW}}, "'<|new|>' has id 9000, and here it would get"),
    ({"added_tokens_decoder": {"x": NEW}}, "added_tokens_decoder: x="),
    ({"added_tokens_decoder": {"300": NEW | {"rstrip": 3}}}, "rstrip=3; allowed"),
    ({"additional_special_tokens": 3}, "additional_special_tokens=3; allowed"),
    ({"bos_token": []}, "bos_token=.*; allowed: a token"),
    ({"chat_template": 3}, "chat_template=3; allowed: text"),
  ],
)
def test_other_fields_are_refused_by_name(fields, message, tmp_path):
  with pytest.raises(ValueError, match=message.replace("|", r"\|")):
    tokenizers.from_folder(merges_folder(tmp_path, fields))
