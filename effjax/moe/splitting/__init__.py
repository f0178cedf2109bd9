"""Splitting an MLP into experts: the ways to choose which hidden unit goes where."""

from effjax.moe.splitting.assignment import equal_assignment
from effjax.moe.splitting.clusters import Clusters, equal_clusters
from effjax.moe.splitting.graph import Graph, co_activation
from effjax.moe.splitting.importance import importance
from effjax.moe.splitting.important import Important, Residual, SharingInner, most_wanted
from effjax.moe.splitting.split import split_ffn
from effjax.moe.splitting.ways import Parts, Random, Way

__all__ = [
  "Clusters",
  "Graph",
  "Important",
  "Parts",
  "Random",
  "Residual",
  "SharingInner",
  "Way",
  "co_activation",
  "equal_assignment",
  "equal_clusters",
  "importance",
  "most_wanted",
  "split_ffn",
]
