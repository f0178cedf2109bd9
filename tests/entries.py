"""Small sources of entries in a cache of one's own, as packages leave them there."""

import json
from pathlib import Path

from effjax.data import debian
from effjax.data.corpus import Document


def store(cache: Path, *, synsets: int = 200, pages: int = 40) -> Path:
  """A cache with "wordnet", and with "manpages" of five sections a page; no two words are equal."""
  word = lambda *numbers: " ".join(f"{kind}{'x'.join(map(str, numbers))}" for kind in "pqrst")
  section = lambda i, j: f"head {i} {j}\nFirst {word(i, j, 1)}. Second {word(i, j, 2)}."
  sources = {
    "wordnet": [f'word{i}: {word(i, 1)}; "{word(i, 2)}"' for i in range(synsets)],
    "manpages": ["\n\n".join(section(i, j) for j in range(5)) for i in range(pages)],
  }
  for name, texts in sources.items():
    path = cache / f"text/{debian.CLEANING_VERSION}/{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = [vars(Document(name, str(i), text)) for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
  return cache
