"""Text out of Debian packages: fetched by name when first asked for, cleaned once, kept as JSONL.

`apt-get download` needs no rights beyond the user's. A package that is already in
`cache_dir()/debian` as a `.deb` is used as it is, so machines without apt can be given the file.
"""

import base64
import dataclasses
import gzip
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from effjax.core.lines import lines
from effjax.data import cleaning, rdata
from effjax.data.cache import cache_dir, fetch, write_whole
from effjax.data.corpus import Document

CLEANING_VERSION = 1
_DOC = Path("usr/share/doc")

_LEXICOGRAPHER_FILES = """
adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location
noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process
noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change
verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation
verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather
adj.ppl
"""


@dataclasses.dataclass(frozen=True)
class Package:
  """A Debian package with text; `read(root, part)` yields documents of the unpacked package.

  `part` is what follows the slash in a source name such as "debian-handbook/fr-FR".
  """

  name: str
  kind: str
  read: Callable[[Path, str, str], Iterable[Document]]
  default_part: str = ""


def _in_reading_order(folder: Path) -> list[Path]:
  """HTML files as the table of contents of `index.html` lists them, the rest by name."""
  pages = sorted(folder.rglob("*.html"))
  index = folder / "index.html"
  links = re.findall(r'href="([^"#:]+\.html)', index.read_text("utf-8")) if index.exists() else []
  order = {folder / link: place for place, link in reversed(list(enumerate(links)))}
  return sorted(pages, key=lambda page: (order.get(page, len(links)), page))


def _pages(folder: Path, domain: str, *, without: str = r"$^") -> Iterator[Document]:
  paths = [path for path in _in_reading_order(folder) if not re.search(without, path.name)]
  texts = [cleaning.html_to_text(path.read_text("utf-8", "replace")) for path in paths]
  for path, text in zip(paths, cleaning.drop_repeated_lines(texts), strict=True):
    yield Document(domain, path.relative_to(folder).as_posix(), cleaning.normalise(text))


def _handbook(root: Path, domain: str, part: str) -> Iterator[Document]:
  folder = root / _DOC / "debian-handbook/html"
  languages = sorted(path.name for path in folder.iterdir() if path.is_dir())
  if part not in languages:
    raise ValueError(f"debian-handbook has no translation {part!r}; it has: {', '.join(languages)}")
  return _pages(folder / part, domain, without=r"^index\.html$")


def _python_doc(root: Path, domain: str, part: str) -> Iterator[Document]:
  skipped = r"^(genindex.*|search|py-modindex|contents|index|download)\.html$"
  return _pages(root / _DOC / "python3.11/html", domain, without=skipped)


def _anarchism(root: Path, domain: str, part: str) -> Iterator[Document]:
  return _pages(root / _DOC / "anarchism/html", domain, without=r"^(index|alinks|links)\.html$")


def _manpages(root: Path, domain: str, part: str) -> Iterator[Document]:
  for path in sorted((root / "usr/share/man").glob("man*/*.gz")):
    if not path.is_symlink():
      page = gzip.decompress(path.read_bytes()).decode(errors="replace")
      yield Document(domain, path.stem, cleaning.roff_to_text(page))


def _dictd_number(digits: str) -> int:
  return int.from_bytes(base64.b64decode(digits.rjust(8, "A")), "big")


def _foldoc(root: Path, domain: str, part: str) -> Iterator[Document]:
  folder = root / "usr/share/dictd"
  data = gzip.decompress((folder / "foldoc.dict.dz").read_bytes())
  places: dict[tuple[int, int], str] = {}
  for line in lines((folder / "foldoc.index").read_text("utf-8")):
    word, offset, length = line.split("\t")[:3]
    places.setdefault((_dictd_number(offset), _dictd_number(length)), word)
  for (start, size), word in sorted(places.items()):
    if not word.startswith("00-database"):
      text = re.sub(r"[{}]", "", data[start : start + size].decode(errors="replace"))
      yield Document(domain, f"{start:08d} {word}", cleaning.normalise(text))


def _fortunes(root: Path, domain: str, part: str) -> Iterator[Document]:
  for path in sorted((root / "usr/share/games/fortunes").iterdir()):
    if path.suffix or path.is_symlink():
      continue
    for number, text in enumerate(path.read_text("utf-8", "replace").split("\n%\n")):
      yield Document(domain, f"{path.name}/{number:05d}", cleaning.normalise(text), path.name)


def _austen(root: Path, domain: str, part: str) -> Iterator[Document]:
  books = rdata.read_package_data(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdx")
  for book, content in books.items():
    chapters = re.split(r"\n(?=chapter [ivxlc\d]+)", "\n".join(content), flags=re.IGNORECASE)
    for number, chapter in enumerate(chapters):
      yield Document(domain, f"{book}/{number:02d}", cleaning.normalise(chapter), book)


def _wordnet(root: Path, domain: str, part: str) -> Iterator[Document]:
  labels = _LEXICOGRAPHER_FILES.split()
  for name in ("noun", "verb", "adj", "adv"):
    for line in lines((root / "usr/share/wordnet" / f"data.{name}").read_text("utf-8")):
      if line.startswith(" "):
        continue
      fields, _, gloss = line.partition(" | ")
      offset, file, _, count, *rest = fields.split()
      words = [word.split("(")[0].replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
      label = labels[int(file)]
      yield Document(domain, f"{name}/{offset}", f"{', '.join(words)}: {gloss.strip()}\n", label)


PACKAGES = {
  "debian-handbook": Package("debian-handbook", "prose", _handbook, "en-US"),
  "python3.11-doc": Package("python3.11-doc", "reference", _python_doc),
  "manpages": Package("manpages", "reference", _manpages),
  "foldoc": Package("dict-foldoc", "reference", _foldoc),
  "fortunes": Package("fortunes", "quotations", _fortunes),
  "anarchism": Package("anarchism", "prose", _anarchism),
  "austen": Package("r-cran-janeaustenr", "prose", _austen),
  "wordnet": Package("wordnet-base", "glosses", _wordnet),
}


def _download(package: str) -> Path:
  """The `.deb` of a package in the cache, fetched where it is not there yet."""
  folder = cache_dir() / "debian"
  if found := sorted(folder.glob(f"{package}_*.deb")):
    return found[-1]
  advice = f"or put the package's .deb file into {folder}"
  if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
    raise FileNotFoundError(
      f"the Debian package {package} is needed, and apt-get or dpkg-deb is not on this machine; "
      f"use a Debian or Ubuntu machine, {advice}"
    )
  advice = f"check the network, run `apt-get update`, {advice}"
  return fetch(folder, "*.deb", ["apt-get", "download", package], advice)


def _unpack_and_read(package: Package, domain: str, part: str) -> list[Document]:
  archive = _download(package.name)
  with tempfile.TemporaryDirectory() as root:
    command = ["dpkg-deb", "-x", str(archive), root]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if result.returncode:
      raise ValueError(f"{archive} is not a whole Debian package: {result.stderr.strip()}")
    return list(package.read(Path(root), domain, part))


def read(source: str) -> list[Document]:
  """The documents of a Debian source, such as "austen" or "debian-handbook/fr-FR".

  The first call fetches the package and cleans it; later ones read `cache_dir()/text`.
  Raises FileNotFoundError where the package cannot be had, ValueError for a part it lacks.
  """
  name, _, part = source.partition("/")
  package = PACKAGES[name]
  if part and not package.default_part:
    raise ValueError(f"text source {name!r} has no parts; given {source!r}")
  cleaned = cache_dir() / "text" / str(CLEANING_VERSION) / f"{source.replace('/', '_')}.jsonl"
  if not cleaned.exists():
    documents = _unpack_and_read(package, source, part or package.default_part)
    lines = "".join(json.dumps(dataclasses.asdict(document)) + "\n" for document in documents)
    write_whole(cleaned, lambda file: file.write(lines.encode()))
  with cleaned.open(encoding="utf-8") as file:
    return [Document(**json.loads(line)) for line in file]
