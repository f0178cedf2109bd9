"""The plots of experiments: what they show is said in words and numbers, how is decided here.

An experiment gives panels; colours, scales, legends and notes follow from what is in them, so that
they hold for any number of kinds and any values.

  panel = Panel("Dense models", Axis("peak learning rate", LOG), Axis("nats a token"), series)
  harness.plot(folder, lambda rows: [panel])
"""

from experiments.lab.plots.differences import differences
from experiments.lab.plots.figure import figure, png
from experiments.lab.plots.panels import LINEAR, LOG, Axis, Line, Panel, Series

__all__ = ["LINEAR", "LOG", "Axis", "Line", "Panel", "Series", "differences", "figure", "png"]
