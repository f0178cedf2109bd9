"""How good is a picture of few colours, and how much better if the colours are its own?

  scripts/run palette                                             (about half a minute)
  scripts/run palette --config.picture=photo.jpg --workdir=runs/photo

The picture of the lecture: each pixel is the index of one of 2^b colours. K-means finds the colours
among those of the picture (Deep Compression, arXiv 1510.00149, section 3, does the same to the
weights of a network: `quant.Palette`). Beside it stands the grid that asks nothing of the picture:
as many bits, shared out among green, red and blue in turn, each channel cut into even steps. A
picture with k-means' colours carries them along, 24 bits each. PSNR is 10 log₁₀(255² / MSE) over
all three channels of the pictures as they are written, in 8 bits.

Without a picture it is matplotlib's sample photograph, the portrait of Grace Hopper by the US Navy,
which is in the public domain.

Measured (`results/palette`): 1 to 6 bits give 16.1, 20.8, 24.7, 28.1, 31.1 and 33.7 dB with colours
of k-means, 10.4, 12.5, 15.9, 17.8, 20.2 and 23.2 dB with those of the grid, of which many are in no
pixel. Pillow's median cut, improved by its own k-means, gives 28.0 dB with 16 colours.
"""

import dataclasses
import functools
import hashlib
import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib import cbook, image

from effjax.quant import kmeans
from effjax.train import workdir as files
from experiments import harness
from experiments.lab.plots import Axis, Line, Panel, Series

KMEANS, GRID = "k-means", "grid"
MOST = 8  # bits a pixel, for whose colours k-means takes some minutes
COLUMNS = {"name": "", "colours": "d", "bits/pixel": ".3f", "bytes": ",d", "PSNR": ".2f"}


@dataclasses.dataclass
class Config:
  """What is reduced to how many colours.

  Attributes:
    picture: a file that matplotlib reads; empty for the sample photograph.
    bits: of a pixel's index, comma-separated.
    steps: of k-means.
    stride: every how many-th row and column is taken; 1 takes all.
  """

  picture: str = ""
  bits: str = "1,2,3,4,5,6"
  steps: int = 30
  stride: int = 1


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row a number of colours and method; writes pictures, `metrics.jsonl`, `result.csv`, a plot.

  The pictures are `kmeans_16.png`, `grid_16.png` and so on.
  """
  bits = harness.numbers("bits", config.bits, int, least=1, most=MOST)
  pixels = picture(config.picture, config.stride)
  folder = files.claim(workdir, config, free=("bits",))
  tasks = {
    f"{method}, {2**b} colours": functools.partial(row, folder, pixels, method, b, config.steps)
    for method in (KMEANS, GRID)
    for b in bits
  }
  rows = harness.compute(folder, tasks, label="pictures")
  harness.plot(folder, panels)
  harness.finish(folder, rows, COLUMNS, claims(rows))
  harness.write_csv(folder, rows)
  return rows


def picture(path: str, stride: int) -> np.ndarray:
  """Pixels [rows, columns, 3], uint8.

  Raises:
    ValueError: for a stride below 1, and for a file that is no picture of three or four channels.
  """
  if stride < 1:
    raise ValueError(f"stride={stride}; allowed: from 1")
  sample = lambda: str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
  try:
    found = image.imread(path or sample())
  except (SyntaxError, OSError) as error:
    raise ValueError(f"picture={path!r} cannot be read: {error}") from error
  if found.ndim != 3 or found.shape[2] not in (3, 4):
    raise ValueError(f"picture={path!r} is {list(found.shape)}; allowed: three or four channels")
  if found.dtype != np.uint8:  # matplotlib gives a PNG's as 0 … 1
    found = (255 * found).round().astype(np.uint8)
  return found[::stride, ::stride, :3]


def row(folder: Path, pixels: np.ndarray, method: str, bits: int, steps: int) -> harness.Row:
  """Size and PSNR of the picture in 2^bits colours, which is written to `folder`."""
  made = of_grid(pixels, bits) if method == GRID else of_its_own(pixels, bits, steps)
  image.imsave(folder / f"{method.replace('-', '')}_{2**bits}.png", made)
  count = pixels.shape[0] * pixels.shape[1]
  size = bits * count + (24 * 2**bits if method == KMEANS else 0)
  return {
    "method": method,
    "bits": bits,
    "colours": len(np.unique(made.reshape(-1, 3), axis=0)),
    "bits/pixel": size / count,
    "bytes": -(-size // 8),
    "PSNR": psnr(pixels, made),
    "picture_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
  }


def of_its_own(pixels: np.ndarray, bits: int, steps: int) -> np.ndarray:
  """The picture in the 2^bits colours that k-means finds, in 8 bits each."""
  points = jnp.asarray(pixels.reshape(-1, 3), jnp.float32)
  colours, index = kmeans(points, 2**bits, steps=steps)
  return np.asarray(colours).round().astype(np.uint8)[np.asarray(index)].reshape(pixels.shape)


def of_grid(pixels: np.ndarray, bits: int) -> np.ndarray:
  """The picture in the colours at the middles of even steps, green having bits before red and blue.

  Example:
    >>> of_grid(np.array([[[0, 100, 200]]], np.uint8), 3).tolist()
    [[[64, 64, 192]]]
  """
  steps = 256 >> np.array([(bits + 1) // 3, (bits + 2) // 3, bits // 3])
  return (pixels // steps * steps + steps // 2).astype(np.uint8)


def psnr(exact: np.ndarray, other: np.ndarray) -> float:
  """10 log₁₀(255² / MSE), in decibel.

  Example:
    >>> psnr(np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8))
    0.0
  """
  off = exact.astype(float) - other.astype(float)
  with np.errstate(divide="ignore"):
    return float(10 * np.log10(255**2 / np.square(off).mean()))


def claims(rows: list[harness.Row]) -> dict[str, bool]:
  """That bits are worth something, and colours of the picture's own more."""
  of = {(row["method"], row["bits"]): row["PSNR"] for row in rows}
  bits = sorted({b for _, b in of})
  own = [of[KMEANS, b] for b in bits]
  found = {
    "k-means is better than the grid at all numbers of bits": all(
      of[KMEANS, b] > of[GRID, b] for b in bits
    )
  }
  if len(bits) > 1:
    found["k-means is better with each bit"] = all(a < b for a, b in itertools.pairwise(own))
  if {4, 6} <= set(bits):
    found["16 colours of k-means are better than 64 of the grid"] = of[KMEANS, 4] > of[GRID, 6]
  return found


def panels(rows: list[harness.Row]) -> list[Panel]:
  """What bits give."""
  series = [
    Series(method, [r["bits/pixel"] for r in of], [r["PSNR"] for r in of])
    for method in (KMEANS, GRID)
    if (of := sorted((r for r in rows if r["method"] == method), key=lambda r: r["bits"]))
  ]
  lines = [Line("16 colours, the lecture's picture", x=4.0)]
  bits, decibel = Axis("bits a pixel, of 24, colours included"), Axis("PSNR in dB")
  return [Panel("Pictures of few colours", bits, decibel, series, lines)]


if __name__ == "__main__":
  harness.main(run, Config())
