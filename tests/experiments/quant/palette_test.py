"""Pictures of few colours: beside Pillow's, and what is written of them."""

import dataclasses
import math

import numpy as np
import pytest
from matplotlib import image
from PIL import Image

from experiments.quant import palette as study

SMALL = study.Config(bits="1,4,6", stride=12)


@pytest.fixture(scope="module")
def pixels():
  return study.picture("", 12)


def test_a_run_writes_pictures_and_says_how_good_they_are(tmp_path, pixels):
  rows = study.run(SMALL, str(tmp_path))
  assert [(row["method"], row["bits"]) for row in rows] == [
    (method, bits) for method in ("k-means", "grid") for bits in (1, 4, 6)
  ]
  count = pixels.shape[0] * pixels.shape[1]
  for row in rows:
    name = f"{row['method'].replace('-', '')}_{2 ** row['bits']}.png"
    written = (255 * image.imread(tmp_path / name)[..., :3]).round().astype(np.uint8)
    assert written.shape == pixels.shape
    assert len(np.unique(written.reshape(-1, 3), axis=0)) == row["colours"] <= 2 ** row["bits"]
    off = np.square(written.astype(int) - pixels.astype(int)).mean()
    assert row["PSNR"] == pytest.approx(10 * math.log10(255**2 / off))
    codebook = 24 * 2 ** row["bits"] if row["method"] == "k-means" else 0
    assert row["bits/pixel"] == (row["bits"] * count + codebook) / count
  assert all(study.claims(rows).values())
  assert {"metrics.jsonl", "plot.png", "result.csv"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("bits", [1, 4, 6])
def test_no_worse_than_pillow(bits, pixels):
  """Better than median cut by far, and as good as that improved by k-means, to a tenth."""
  ours = study.psnr(pixels, study.of_its_own(pixels, bits, 30))
  for kmeans, less in ((0, 0.0), (1, 0.1)):
    theirs = Image.fromarray(pixels).quantize(
      2**bits, Image.Quantize.MEDIANCUT, kmeans=kmeans, dither=Image.Dither.NONE
    )
    assert ours > study.psnr(pixels, np.asarray(theirs.convert("RGB"))) - less


def test_a_grid_has_as_many_colours_as_bits_allow():
  every = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3), -1).reshape(1, -1, 3).astype(np.uint8)
  for bits in range(1, 9):
    found = study.of_grid(every, bits)
    assert len(np.unique(found[0], axis=0)) == 2**bits
    shares = np.array([(bits + 1) // 3, (bits + 2) // 3, bits // 3])
    assert (np.abs(found.astype(int) - every).max((0, 1)) <= 128 >> shares).all()


def test_bad_input_is_named(tmp_path):
  spoilt, grey = tmp_path / "spoilt.png", tmp_path / "grey.png"
  spoilt.write_bytes(b"no picture")
  Image.fromarray(np.zeros((4, 4), np.uint8)).save(grey)
  for message, change in {
    "bits='0'; allowed: integers from 1 to 8": {"bits": "0"},
    "bits='4,x'; allowed": {"bits": "4,x"},
    "stride=0; allowed: from 1": {"stride": 0},
    "cannot be read": {"picture": str(spoilt)},
    r"is \[4, 4\]; allowed: three or four channels": {"picture": str(grey)},
  }.items():
    with pytest.raises(ValueError, match=message):
      study.run(dataclasses.replace(SMALL, **change), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
