"""Plain text from HTML and manual pages, and the removal of what is repeated."""

import re
from collections.abc import Iterable
from html.parser import HTMLParser

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
_SKIPPED = {"script", "style", "head", "nav", "form", "svg", "button"}
_SKIPPED_CLASSES = {"headerlink", "docnav", "related", "sphinxsidebar", "footer", "linenos"}
_SKIPPED_IDS = {"banner", "sidebar", "footer"}
_VOID = {
  "area",
  "base",
  "br",
  "col",
  "embed",
  "hr",
  "img",
  "input",
  "link",
  "meta",
  "source",
  "wbr",
}
_BLOCKS = """
address article aside blockquote body caption dd div dl dt figcaption figure h1 h2 h3 h4 h5 h6
header hr li main ol p pre section table tbody td th thead title tr ul
"""
_BLOCK_TAGS = frozenset(_BLOCKS.split())


def normalise(text: str) -> str:
  """Unix line ends, no control characters, no blanks at line ends, at most one empty line.

  Indentation and inner spaces stay, so code survives.

  >>> normalise("a  b \\r\\n\\r\\n\\r\\n  c\\x00\\n\\n")
  'a  b\\n\\n  c\\n'
  """
  text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
  lines = "\n".join(line.rstrip() for line in text.split("\n"))
  body = re.sub(r"\n{3,}", "\n\n", lines).strip("\n")
  return body + "\n" if body else ""


class _Reader(HTMLParser):
  """Collects text of a page; `depth` counts the open elements inside a skipped one."""

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.parts: list[str] = []
    self.skipping: list[str] = []
    self.preformatted = 0

  def _is_skipped(self, tag, attributes) -> bool:
    values = dict(attributes)
    classes = set((values.get("class") or "").split())
    return tag in _SKIPPED or bool(classes & _SKIPPED_CLASSES) or values.get("id") in _SKIPPED_IDS

  def handle_starttag(self, tag, attrs):
    if tag in _VOID:
      if tag in ("br", "hr") and not self.skipping:
        self.parts.append("\n")
      return
    if self.skipping or self._is_skipped(tag, attrs):
      self.skipping.append(tag)
      return
    self.preformatted += tag == "pre"
    if tag in _BLOCK_TAGS:
      self.parts.append("\n\n" if tag not in ("li", "tr", "td", "th", "dd") else "\n")

  def handle_startendtag(self, tag, attrs):
    if tag in ("br", "hr"):
      self.handle_starttag(tag, attrs)

  def handle_endtag(self, tag):
    if self.skipping:
      if tag in self.skipping:
        while self.skipping.pop() != tag:
          pass
      return
    self.preformatted -= tag == "pre" and self.preformatted > 0
    if tag in _BLOCK_TAGS:
      self.parts.append("\n\n" if tag in ("p", "pre", "div", "table", "ul", "ol", "dl") else "\n")

  def handle_data(self, data):
    if not self.skipping:
      self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def html_to_text(page: str) -> str:
  """The readable text of an HTML page: blocks on lines of their own, `pre` kept as it stands.

  Scripts, styles, forms and navigation are left out. Where the page marks its main part
  (`role="main"` or `<main>`), only that is read.

  >>> html_to_text("<h1>Title</h1><p>One\\n <b>two</b></p><script>x()</script><pre>a\\n  b</pre>")
  'Title\\n\\nOne two\\n\\na\\n  b\\n'
  """
  main = re.search(r'<(?:main|\w+[^>]*\brole="main")[^>]*>', page)
  reader = _Reader()
  reader.feed(page[main.start() :] if main else page)
  reader.close()
  lines = "".join(reader.parts).split("\n")
  return normalise("\n".join(re.sub(r"^ (?=\S)", "", line) for line in lines))


_ROFF_SPECIAL = {
  "(em": "—", "(en": "–", "(aq": "'", "(dq": '"', "(bu": "•", "(co": "©", "(ti": "~", "(ha": "^",
  "(lq": "“", "(rq": "”", "(oq": "‘", "(cq": "’", "(mu": "×", "(->": "→", "(<=": "≤", "(>=": "≥",
  "(rs": "\\", "(ga": "`", "-": "-", "e": "\\", " ": " ", "~": " ", "0": " ", "|": "", "^": "",
  "&": "", "/": "", ",": "", "%": "", ":": "", "c": "", "'": "'", "`": "`", ".": ".",
}  # fmt: skip
_ROFF_ESCAPE = re.compile(
  r"\\(?:f(?:\[[^\]]*\]|\(..|.)|s[+-]?\d+|[hvw]'[^']*'|\*(?:\[[^\]]*\]|\(..|.)|m\[[^\]]*\]"
  r"|\[([^\]]*)\]|(\(..)|(.))"
)
_ROFF_TEXT = {"B", "I", "R", "SM", "SB", "TQ", "IP", "UR", "MT"}
_ROFF_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}


def _roff_inline(text: str) -> str:
  def replace(match):
    name = ("(" + match[1] if match[1] is not None else None) or match[2] or match[3]
    return _ROFF_SPECIAL.get(name, "") if name else ""

  return _ROFF_ESCAPE.sub(replace, re.sub(r'\\["#].*', "", text))


def _roff_arguments(line: str) -> list[str]:
  words = re.findall(r'"((?:[^"]|"")*)"|((?:\\.|\S)+)', line)
  return [_roff_inline(quoted or plain) for quoted, plain in words]


def _roff_line(line: str) -> str:
  """What one line of a manual page prints; requests that only lay out print nothing."""
  if not line.startswith((".", "'")):
    return _roff_inline(line)
  name, _, rest = line[1:].strip().partition(" ")
  arguments = _roff_arguments(rest)
  if name in ("SH", "SS"):
    return "\n" + " ".join(arguments)
  if name in ("PP", "P", "LP", "TP", "HP", "sp"):
    return ""
  if name == "IP":
    return "\n" + " ".join(arguments[:1])
  if name in _ROFF_TEXT:
    return " ".join(arguments)
  return "".join(arguments) if name in _ROFF_ALTERNATING else "\0"


def roff_to_text(page: str) -> str:
  """The text of a manual page written with the `man` macros.

  Fonts are dropped, headings kept, tables keep their cells; layout requests print nothing.

  >>> roff_to_text('.TH X 7\\n.SH NAME\\nfifo \\\\- a \\\\fBnamed\\\\fP pipe\\n.BR open (2)')
  'NAME\\nfifo - a named pipe\\nopen(2)\\n'
  """
  lines = (_roff_line(line) for line in page.split("\n"))
  return normalise("\n".join(line for line in lines if line != "\0"))


def drop_repeated_lines(texts: Iterable[str], *, width: int = 32) -> list[str]:
  """The texts without any line of `width` characters or more that occurred before.

  Boilerplate such as licences and page headers stays once, in the first text that has it.
  Raises ValueError where `width` is below 1.

  >>> drop_repeated_lines(["same same\\none\\n", "same same\\ntwo\\n"], width=5)
  ['same same\\none\\n', 'two\\n']
  """
  if width < 1:
    raise ValueError(f"width is {width}; it must be at least 1")
  seen: set[str] = set()
  kept = []
  for text in texts:
    lines = text.split("\n")
    fresh = [line for line in lines if len(line.strip()) < width or line.strip() not in seen]
    seen.update(line.strip() for line in lines)
    kept.append("\n".join(fresh))
  return kept
