"""One matrix product per group of rows: what the experts of a mixture compute."""

from effjax.kernels.grouped_matmul.grouped import Grouped
from effjax.kernels.grouped_matmul.grouped_linear import grouped_linear
from effjax.kernels.grouped_matmul.groups import Groups

__all__ = ["Grouped", "Groups", "grouped_linear"]
