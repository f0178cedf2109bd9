"""Tokenizers of pretrained models, from tokenizer.json, vocab.txt or merges.txt.

All end as a `tokenizers.Tokenizer`; this file says how each kind of vocabulary is turned into one,
and `tokenizer_fields` what tokenizer_config.json changes about it.
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
from tokenizers import decoders, normalizers, pre_tokenizers

from effjax.models import tokenizer_fields
from effjax.models.families.fields import Fields
from effjax.models.folders import Folder

LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_PATTERN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
  """A tokenizer with the special tokens of its model.

  Attributes:
    backend: does the work.
    bos_id, eos_id, pad_id: ids that begin, end and fill sequences (BERT's [CLS], [SEP], [PAD]);
      None where the model has none; `pad_id` falls back to `eos_id`.
    chat_template: the Jinja template of a chat model, or None.
    fields: what else tokenizer_config.json said, and shall say again.

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
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
    config = tokenizer_fields.written(self.fields, self._named(), self.chat_template)
    self.backend.save(str(Path(folder) / "tokenizer.json"))
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2))

  def _named(self) -> dict[str, str]:
    ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
    names = {role: self.backend.id_to_token(i) for role, i in ids.items() if i is not None}
    return {role: name for role, name in names.items() if name is not None}


def from_folder(folder: str | Path) -> PretrainedTokenizer:
  """The tokenizer of a Hugging Face folder.

  Raises:
    FileNotFoundError: when the folder has no tokenizer.json, vocab.txt, or vocab.json and
      merges.txt.
    ValueError: when one of them cannot be read, and for fields of tokenizer_config.json that would
      change the ids and are not known.
  """
  files = Folder(folder)
  fields, config = tokenizer_fields.of_folder(files)
  if files.has("tokenizer.json"):
    text, where = files.text("tokenizer.json"), str(files.file("tokenizer.json"))
    backend, whole = built(where, lambda: hf.Tokenizer.from_str(text)), True
  elif files.has("vocab.txt"):
    vocab = {word: i for i, word in enumerate(lines(files.text("vocab.txt")))}
    fields.assume(BERT)
    names = {role: tokenizer_fields.content(fields, role) or BERT[role] for role in BERT}
    backend, whole = wordpiece(vocab, names=names).backend, False
  elif files.has("vocab.json") and files.has("merges.txt"):
    backend, whole = _merges_folder(files, fields), False
  else:
    wanted = "tokenizer.json, vocab.txt, or vocab.json and merges.txt"
    raise FileNotFoundError(f"{folder}: no tokenizer; looked for {wanted}")
  tokenizer_fields.apply(backend, fields, files, whole)
  begin, end, pad = tokenizer_fields.roles(backend, fields)
  template = tokenizer_fields.template(fields, files)
  kept = config if whole else config | {"tokenizer_class": tokenizer_fields.GENERIC[0]}
  return PretrainedTokenizer(backend, begin, end, pad, template, kept)


def built(where: str, make: Callable[[], hf.Tokenizer]) -> hf.Tokenizer:
  """What `make` gives; its errors are ValueErrors that begin with `where`."""
  try:
    return make()
  except BaseException as error:  # the binding raises plain Exception, or a panic that is none
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
      raise ValueError(f"{where}: damaged, or no tokenizer: {error}") from error
    raise


def lines(text: str) -> list[str]:
  """The lines of a text; only ends of lines end them, not what Unicode has besides.

  Example:
    >>> lines("a\\u2028b\\r\\nc\\n")
    ['a\\u2028b', 'c']
  """
  found = text.replace("\r\n", "\n").split("\n")
  return found if found[-1] else found[:-1]


BERT = {
  "unk_token": "[UNK]",
  "cls_token": "[CLS]",
  "sep_token": "[SEP]",
  "pad_token": "[PAD]",
  "mask_token": "[MASK]",
}


def wordpiece(
  vocab: Mapping[str, int], lowercase: bool = True, names: Mapping[str, str] = BERT
) -> PretrainedTokenizer:
  """BERT's WordPiece (arXiv 1810.04805; longest match first) over `vocab`."""
  for role, token in names.items():
    if token not in vocab and role != "mask_token":
      raise ValueError(f"vocab: lacks {token}; allowed: BERT vocabularies")
  backend = hf.Tokenizer(hf.models.WordPiece(dict(vocab), unk_token=names["unk_token"]))
  backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece(prefix="##")
  present = [token for token in names.values() if token in vocab]
  backend.add_special_tokens([hf.AddedToken(token, normalized=False) for token in present])
  begin, end, pad = (names[f"{role}_token"] for role in ("cls", "sep", "pad"))
  backend.post_processor = tokenizer_fields.around(backend, begin, end)
  return PretrainedTokenizer(backend, vocab[begin], vocab[end], vocab[pad])


def _byte_level_split() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_split() -> pre_tokenizers.PreTokenizer:
  digits = pre_tokenizers.Digits(individual_digits=True)
  return pre_tokenizers.Sequence([digits, _byte_level_split()])


def _pattern_split(pattern: str) -> pre_tokenizers.PreTokenizer:
  words = pre_tokenizers.Split(hf.Regex(pattern), "isolated")
  letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([words, letters])


SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
  "gpt-2": _byte_level_split,
  "default": _byte_level_split,
  "smollm": _byte_level_split,
  "digits": _digits_split,
  **dict.fromkeys(
    ("llama-bpe", "llama3", "llama-v3"), functools.partial(_pattern_split, LLAMA3_PATTERN)
  ),
  "qwen2": functools.partial(_pattern_split, QWEN2_PATTERN),
  "tekken": functools.partial(_pattern_split, TEKKEN_PATTERN),
}


def byte_level(
  vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], split: str, whole: bool = False
) -> hf.Tokenizer:
  """Byte-level BPE as GPT-2 has it, with words cut by `SPLITS[split]`.

  With `whole`, a word that is in the vocabulary is one token, whatever the merges say.
  """
  if split not in SPLITS:
    raise ValueError(f"split={split!r}; allowed: {', '.join(SPLITS)}")
  backend = hf.Tokenizer(hf.models.BPE(dict(vocab), list(merges), ignore_merges=whole))
  backend.pre_tokenizer = SPLITS[split]()
  backend.decoder = decoders.ByteLevel()
  return backend


def _merges_folder(files: Folder, fields: Fields) -> hf.Tokenizer:
  vocab, where = files.json("vocab.json"), str(files.file("vocab.json"))
  if not all(type(number) is int and number >= 0 for number in vocab.values()):
    raise ValueError(f"{where}: damaged; allowed: token → id")
  rules = (
    line.partition(" ")
    for line in lines(files.text("merges.txt"))
    if line and not line.startswith("#version")
  )
  merges = [(first, second) for first, _, second in rules]
  return tokenizer_fields.of_class(
    fields, files, lambda split: built(where, lambda: byte_level(vocab, merges, split))
  )
