"""Tokenizers of pretrained models, from tokenizer.json, vocab.txt or merges.txt.

All end as a `tokenizers.Tokenizer`; this file says how each description is turned into one.
"""

import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers as hf
from tokenizers import decoders, normalizers, pre_tokenizers, processors

LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROLES = {
  "bos_token": ("bos_token", "cls_token"),
  "eos_token": ("eos_token", "sep_token"),
  "pad_token": ("pad_token",),
}


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
  """A tokenizer with the special tokens of its model.

  Attributes:
    backend: does the work.
    bos_id, eos_id, pad_id: ids that begin, end and fill sequences (BERT's [CLS], [SEP], [PAD]);
      None where the model has none; `pad_id` falls back to `eos_id`.
    chat_template: the Jinja template of a chat model, or None.

  Example:
    >>> words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "deep": 4, "##er": 5}
    >>> tokenizer = wordpiece(words)
    >>> tokenizer.encode("Deeper"), tokenizer.encode("deep", add_special=False)
    ([1, 4, 5, 2], [4])
    >>> tokenizer.decode([1, 4, 5, 2])
    'deeper'
  """

  backend: hf.Tokenizer
  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int | None = None
  chat_template: str | None = None

  def __post_init__(self):
    self.backend.no_truncation()
    self.backend.no_padding()
    if self.pad_id is None:
      object.__setattr__(self, "pad_id", self.eos_id)

  def __repr__(self) -> str:
    names = ("bos_id", "eos_id", "pad_id")
    ids = ", ".join(f"{name}={getattr(self, name)}" for name in names)
    return f"PretrainedTokenizer({self.vocab_size} tokens, {ids})"

  @property
  def vocab_size(self) -> int:
    """How many ids there are, added tokens included."""
    return self.backend.get_vocab_size()

  @functools.cached_property
  def fingerprint(self) -> str:
    """A digest of everything that decides the ids."""
    return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

  def encode(self, text: str, *, add_special: bool = True) -> list[int]:
    """Ids of `text`; with `add_special`, between the tokens that the model puts around a text.

    Those are none for SmolLM2, <bos> before for Gemma, [CLS] and [SEP] for BERT. Special tokens
    that are spelled out in `text` become their ids.
    """
    return self.backend.encode(text, add_special_tokens=add_special).ids

  def decode(self, ids: Iterable[SupportsIndex], *, keep_special: bool = False) -> str:
    """The text of `ids`, without special tokens unless `keep_special`.

    Raises:
      ValueError: for an id outside the vocabulary.
    """
    numbers = [operator.index(token) for token in ids]
    outside = [token for token in numbers if not 0 <= token < self.vocab_size]
    if outside:
      raise ValueError(f"token id {outside[0]}; allowed: 0 to {self.vocab_size - 1}")
    return self.backend.decode(numbers, skip_special_tokens=not keep_special)

  def save(self, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
    named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {k: self.backend.id_to_token(v) for k, v in named.items() if v is not None}
    config |= {"chat_template": self.chat_template} if self.chat_template else {}
    self.backend.save(str(Path(folder) / "tokenizer.json"))
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def from_folder(folder: str | Path) -> PretrainedTokenizer:
  """The tokenizer of a Hugging Face folder.

  Raises:
    FileNotFoundError: when the folder has no tokenizer.json, vocab.txt, or vocab.json and
      merges.txt.
    ValueError: when one of them cannot be read.
  """
  folder = Path(folder)
  config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
  if (folder / "tokenizer.json").is_file():
    return _named(_backend_file(folder / "tokenizer.json"), config, _template(folder, config))
  if (folder / "vocab.txt").is_file():
    words = (folder / "vocab.txt").read_text("utf-8").splitlines()
    vocab = {word: i for i, word in enumerate(words)}
    return wordpiece(vocab, lowercase=config.get("do_lower_case", True))
  if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    return _merges_folder(folder, config)
  wanted = "tokenizer.json, vocab.txt, or vocab.json and merges.txt"
  raise FileNotFoundError(f"{folder}: no tokenizer; looked for {wanted}")


def wordpiece(vocab: Mapping[str, int], lowercase: bool = True) -> PretrainedTokenizer:
  """BERT's WordPiece (arXiv 1810.04805; longest match first) over `vocab`."""
  for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]"):
    if token not in vocab:
      raise ValueError(f"vocab: lacks {token}; allowed: BERT vocabularies")
  backend = hf.Tokenizer(hf.models.WordPiece(dict(vocab), unk_token="[UNK]"))
  backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece(prefix="##")
  present = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab]
  backend.add_special_tokens([hf.AddedToken(token, normalized=False) for token in present])
  backend.post_processor = around(backend, "[CLS]", "[SEP]")
  return PretrainedTokenizer(backend, vocab["[CLS]"], vocab["[SEP]"], vocab["[PAD]"])


def _byte_level_split() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_split() -> pre_tokenizers.PreTokenizer:
  digits = pre_tokenizers.Digits(individual_digits=True)
  return pre_tokenizers.Sequence([digits, _byte_level_split()])


def _llama3_split() -> pre_tokenizers.PreTokenizer:
  words = pre_tokenizers.Split(hf.Regex(LLAMA3_PATTERN), "isolated")
  letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([words, letters])


SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
  "gpt-2": _byte_level_split,
  "default": _byte_level_split,
  "smollm": _byte_level_split,
  "digits": _digits_split,
  "llama-bpe": _llama3_split,
}


def byte_level(
  vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], split: str
) -> hf.Tokenizer:
  """Byte-level BPE as GPT-2 has it, with words cut by `SPLITS[split]`."""
  if split not in SPLITS:
    raise ValueError(f"split={split!r}; allowed: {', '.join(SPLITS)}")
  backend = hf.Tokenizer(hf.models.BPE(dict(vocab), list(merges)))
  backend.pre_tokenizer = SPLITS[split]()
  backend.decoder = decoders.ByteLevel()
  return backend


def around(
  backend: hf.Tokenizer, before: str | None, after: str | None
) -> processors.TemplateProcessing:
  """The post-processor that puts the given special tokens around a text."""
  parts = [*([before] if before else []), "$A", *([after] if after else [])]
  special = [(token, backend.token_to_id(token)) for token in (before, after) if token]
  return processors.TemplateProcessing(single=parts, special_tokens=special)


def _merges_folder(folder: Path, config: Mapping[str, Any]) -> PretrainedTokenizer:
  vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
  lines = (folder / "merges.txt").read_text("utf-8").split("\n")
  rules = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
  merges = [(first, second) for first, _, second in rules]
  backend = byte_level(vocab, merges, "gpt-2")
  names = {role: _content(config.get(role)) for role in ("bos_token", "eos_token", "pad_token")}
  special = sorted({name for name in names.values() if name})
  backend.add_special_tokens([hf.AddedToken(name, normalized=False) for name in special])
  if config.get("add_bos_token") and names["bos_token"]:
    backend.post_processor = around(backend, names["bos_token"], None)
  return _named(backend, config, _template(folder, config))


def _named(backend: hf.Tokenizer, config: Mapping[str, Any], template) -> PretrainedTokenizer:
  def number(names: tuple[str, ...]) -> int | None:
    token = next((_content(config[name]) for name in names if config.get(name)), None)
    return None if token is None else backend.token_to_id(token)

  begin, end, pad = map(number, ROLES.values())
  return PretrainedTokenizer(backend, begin, end, pad, template)


def _content(token: str | Mapping[str, Any] | None) -> str | None:
  return token["content"] if isinstance(token, Mapping) else token


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
  file = folder / "chat_template.jinja"
  return file.read_text("utf-8") if file.is_file() else config.get("chat_template")


def _backend_file(path: Path) -> hf.Tokenizer:
  try:
    return hf.Tokenizer.from_file(str(path))
  except Exception as error:  # the binding raises plain Exception for a file it cannot parse
    raise ValueError(f"{path}: damaged, or no tokenizer file: {error}") from error


def _json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text("utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}: damaged: {error}") from error
