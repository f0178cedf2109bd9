"""Does a pretrained model survive a sliding window, and do its first tokens save it?

  scripts/run pretrained_window                                                 (about 4 minutes)
  scripts/run pretrained_window --config.model=gemma3-270m --workdir=runs/gemma_window

StreamingLLM (arXiv 2309.17453, sections 3.1 and 3.2) found that a model which was trained to see
everything collapses as soon as the window leaves the first tokens behind, since much of its
attention rests there whatever they say; and that leaving four of them in sight ("sinks") restores
it. Here every layer of a model is given windows, alone and with sinks, and reads the beginnings of
held-out documents. A token sees w keys in all, itself and sinks among them, so that sinks take the
place of as many neighbours; positions are those in the text. Perplexity is taken over the tokens
from position w on, the first that miss the beginning, and compared with the whole model's over the
same tokens. What the model can know from so little text is shown by reading afresh: pieces of w
tokens, each beginning w/2 later behind the text's first token, count with their second halves.

Measured in float32, as ratios to the whole model's perplexity behind windows of 64, 128, 256 and
512 keys. SmolLM2-135M (4 files of networkx): alone 8.2, 4.1, 2.9 and 2.3; with one sink 1.64, 1.39,
1.28 and 1.16; with four 1.65, 1.39, 1.29 and 1.16; afresh 1.84, 1.46, 1.34 and 1.29. So a window
alone collapses and sinks restore all that so many tokens tell; but one sink is enough, where the
paper's models want four. Gemma 3 270M (2 files), whose layers but every sixth have windows of 512
of their own: alone 5.3, 2.9, 1.9 and 1.4; with one sink, its <bos>, 1.98, 1.59, 1.38 and 1.20; with
four 2.03, 1.60, 1.39 and 1.21; afresh 1.96, 1.57, 1.38 and 1.39.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from effjax import data
from effjax.attention import masks
from effjax.data.tokenizers import Tokenizer
from effjax.train import perplexity
from effjax.train import workdir as files
from experiments import harness
from experiments.lab.plots import LINEAR, LOG, Axis, Line, Panel, Series
from experiments.lab.subject import Subject, load, token_nll

FULL, AFRESH = "full", "afresh"
BIN = 16  # positions over which the curve is averaged
COLLAPSE, CLOSE = 2.0, 1.1  # ratios to the whole model's perplexity
AS_GOOD = 1.05  # ratio to the perplexity of reading afresh
COLUMNS = {
  "name": "",
  "window": "",
  "sinks": "",
  "perplexity": ",.2f",
  "after": ",.2f",
  "full after": ",.2f",
  "ratio": ".2f",
}


@dataclasses.dataclass
class Config:
  """What is read, and through what.

  Attributes:
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    text: a source of `data.text`, whose validation split is read.
    rows, length: documents, and the tokens predicted of each.
    windows: keys that a token sees, multiples of 16 below `length`, comma-separated.
    sinks: how many of them are the first, comma-separated.
  """

  model: str = "smollm2-135m"
  text: str = "libraries"
  rows: int = 4
  length: int = 1024
  windows: str = "64,128,256,512"
  sinks: str = "0,1,4"


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row a mask; writes `metrics.jsonl`, `result.csv` and `plot.png` to `workdir`."""
  windows, sinks = sizes(config)
  folder = files.claim(workdir, config)
  reader = Reader(config)
  tasks = {FULL: functools.partial(reader.row, None, 0)}
  for window in windows:
    tasks |= {f"window={window} sinks={s}": functools.partial(reader.row, window, s) for s in sinks}
    tasks[f"window={window} {AFRESH}"] = functools.partial(reader.afresh, window)
  rows = compared(harness.compute(folder, tasks, label="masks"))
  harness.plot(folder, panels)
  harness.finish(folder, rows, COLUMNS, claims(rows))
  harness.write_csv(folder, rows)
  return rows


class Reader:
  """A model, loaded when first asked, and the documents it reads."""

  def __init__(self, config: Config):
    self.config = config

  def row(self, window: int | None, sinks: int) -> harness.Row:
    """The mean nll of all tokens, and of every `BIN` of them in order."""
    subject, batches = self._ready
    if window is not None:
      subject = narrowed(subject, windowed(window, sinks))
    return {"window": window, "sinks": sinks, **binned(read(subject, batch) for batch in batches)}

  def afresh(self, window: int) -> harness.Row:
    """The same of a model that reads no more than `window` tokens at a time."""
    subject, batches = self._ready
    parts = (read(subject, pieces(batch, window)) for batch in batches)
    joined = (np.concatenate([x[0], x[1:, window // 2 :].ravel()])[None] for x in parts)
    return {"window": window, "sinks": None, **binned(joined)}

  @functools.cached_property
  def _ready(self) -> tuple[Subject, list[dict]]:
    subject, tokenizer = load(self.config.model)
    return subject, documents(self.config, tokenizer)


def read(subject: Subject, batch: dict) -> np.ndarray:
  """Nats of each token, [rows, length]."""
  return np.asarray(token_nll(subject.module, subject.params, batch), float)


def pieces(batch: dict, window: int) -> dict:
  """A row as overlapping rows of `window` tokens, each beginning half a window later.

  The first token of each is the row's own first, which may be <bos>.
  """
  starts = range(0, batch["tokens"].shape[1] - window + 1, window // 2)
  cut = {name: jnp.concatenate([x[:, i : i + window] for i in starts]) for name, x in batch.items()}
  return {**cut, "tokens": cut["tokens"].at[:, 0].set(batch["tokens"][0, 0])}


def binned(rows: Iterable[np.ndarray]) -> harness.Row:
  """The mean over rows and tokens, and over rows and every `BIN` tokens in order."""
  nll = np.concatenate(list(rows)).mean(axis=0)
  return {"nll": float(nll.mean()), "curve": nll.reshape(-1, BIN).mean(axis=1).tolist()}


def windowed(window: int, sinks: int) -> masks.Mask:
  """The `sinks` first tokens and the last `window` − `sinks`, a token itself among these."""
  near = masks.SlidingWindow(window - sinks - 1, 0)
  return near | (masks.Prefix(sinks) & masks.Causal()) if sinks else near


def narrowed(subject: Subject, mask: masks.Mask) -> Subject:
  """The model seeing through `mask` and each layer's own."""

  def narrow(_, spec):
    return dataclasses.replace(spec, mixer=spec.mixer.clone(mask=spec.mixer.mask & mask))

  return subject.with_layers(narrow)


def documents(config: Config, tokenizer: Tokenizer) -> list[dict]:
  """A batch of one row from each of the first documents that are long enough.

  Raises:
    ValueError: when there are not as many.
  """
  found = []
  for document in data.text(config.text).select(split="validation"):
    tokens = np.array(tokenizer.encode(document.text)[: config.length + 1], np.int32)[None]
    if tokens.shape[1] > config.length:
      found.append({"tokens": jnp.array(tokens[:, :-1]), "targets": jnp.array(tokens[:, 1:])})
    if len(found) == config.rows:
      return found
  raise ValueError(
    f"rows={config.rows}; allowed: up to {len(found)}, the documents of {config.text!r} that are "
    f"held out and have over {config.length} tokens"
  )


def sizes(config: Config) -> tuple[list[int], list[int]]:
  """Windows and sinks.

  Raises:
    ValueError: for lists or a length that do not fit the bins or one another.
  """
  windows, sinks = (
    harness.numbers(name, getattr(config, name), int, least=0) for name in ("windows", "sinks")
  )
  fits = lambda w: w % BIN == 0 and 0 < w < config.length and config.length % (w // 2) == 0
  if config.length % BIN or not all(map(fits, windows)):
    raise ValueError(
      f"windows={config.windows!r}, length={config.length}; allowed: multiples of {BIN}, windows "
      "below the length, which is a multiple of half of each"
    )
  if max(sinks) >= min(windows):
    raise ValueError(
      f"sinks={config.sinks!r}; allowed: from 0 and less than the least window, {min(windows)}"
    )
  return windows, sinks


def compared(rows: list[harness.Row]) -> list[harness.Row]:
  """Perplexities over all tokens, and over those from the window's width on, with the full model's.

  The curve is left out.
  """
  full = next(row for row in rows if row["name"] == FULL)
  return [_compared(row, full["curve"]) for row in rows]


def _compared(row: harness.Row, full: list[float]) -> harness.Row:
  first = (row["window"] or 0) // BIN
  after, full_after = (float(np.mean(curve[first:])) for curve in (row["curve"], full))
  return {
    **{name: row[name] for name in ("name", "window", "sinks", "nll")},
    "perplexity": perplexity(row["nll"]),
    "after": perplexity(after),
    "full after": perplexity(full_after),
    "ratio": perplexity(after - full_after),
  }


def claims(rows: list[harness.Row]) -> dict[str, bool]:
  """What StreamingLLM found, judged by perplexities over the full model's, behind the window."""
  by_sinks: dict[int | None, list[float]] = {}
  for row in rows:
    if row["name"] != FULL:
      by_sinks.setdefault(row["sinks"], []).append(row["ratio"])
  found = {}
  if 0 in by_sinks:
    text = "a window alone collapses: at least twice the perplexity, whatever its width"
    found[text] = min(by_sinks[0]) > COLLAPSE
  if 4 in by_sinks:
    text = "4 sinks restore it: within 5 % of reading as many tokens afresh, or better"
    pairs = zip(by_sinks[None], by_sinks[4], strict=True)
    found[text] = all(four < AS_GOOD * afresh for afresh, four in pairs)
    text = "with 4 sinks the model is within 10 % of seeing everything, whatever the width"
    found[text] = max(by_sinks[4]) < CLOSE
  if {1, 4} <= by_sinks.keys():
    text = "4 sinks are better than 1"
    pairs = zip(by_sinks[1], by_sinks[4], strict=True)
    found[text] = all(four < one for one, four in pairs)
  return found


def panels(rows: list[harness.Row]) -> list[Panel]:
  """Perplexity behind the window over its width, and nats along the text."""
  table = [row for row in compared(rows) if row["name"] != FULL]
  by_sinks: dict[int | None, list[harness.Row]] = {}
  for row in table:
    by_sinks.setdefault(row["sinks"], []).append(row)
  ratios = [
    Series(_label(line[0]), [row["window"] for row in line], [row["ratio"] for row in line])
    for line in by_sinks.values()
  ]
  lines = [
    Line("collapse: twice the perplexity", y=COLLAPSE),
    Line("as good: within 10 %", y=CLOSE),
  ]
  if None in by_sinks:
    x, y = zip(*((row["window"], AS_GOOD * row["ratio"]) for row in by_sinks[None]), strict=True)
    lines.append(Line("5 % above reading afresh: restored if below", x, y))
  widths = sorted({row["window"] for row in table})
  keys = Axis("keys that a token sees", LOG, {width: f"{width:,}" for width in widths})
  ratio = Axis("perplexity behind the window, over the whole model's")
  middle = widths[len(widths) // 2]
  along = [
    Series(_label(row), [BIN * (i + 0.5) for i in range(len(row["curve"]))], row["curve"])
    for row in rows
    if row["name"] == FULL or row["window"] == middle
  ]
  text, nats = (
    Axis("position in the text (tokens)", LINEAR),
    Axis(f"nats a token, mean of {BIN} positions"),
  )
  end = [Line("end of the first window", x=float(middle))]
  return [
    Panel("Behind the window", keys, ratio, ratios, lines),
    Panel(f"Along the text, {middle} keys seen", text, nats, along, end),
  ]


def _label(row: harness.Row) -> str:
  if row["name"] == FULL:
    return "the whole model"
  return f"{AFRESH}, in pieces" if row["sinks"] is None else f"{row['sinks']} sinks"


if __name__ == "__main__":
  harness.main(run, Config())
