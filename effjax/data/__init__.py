"""Text by name, pairs for retrieval, tokenizers, packing, and loaders whose place can be saved."""

from effjax.data.batches import Loader, domain_rows, epoch, loader
from effjax.data.cache import cache_dir
from effjax.data.corpus import Corpus, Document, combine, split_of
from effjax.data.packing import Plan, best_fit, contiguous, pack
from effjax.data.sources import names, text
from effjax.data.stream import TokenStream, tokenize
from effjax.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, VocabularyTokenizer

__all__ = [
  "BPETokenizer",
  "ByteTokenizer",
  "Corpus",
  "Document",
  "Loader",
  "Plan",
  "TokenStream",
  "Tokenizer",
  "VocabularyTokenizer",
  "best_fit",
  "cache_dir",
  "combine",
  "contiguous",
  "domain_rows",
  "epoch",
  "loader",
  "names",
  "pack",
  "split_of",
  "text",
  "tokenize",
]
