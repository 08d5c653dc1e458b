"""Quantization of one class: k points and their masses, by one contract and several engines."""

from dq.cluster.kmeans import Clustering, choose_engine, kmeans, kmeans_many, nearest, quantization_stats
from dq.cluster.lloyd import kmeans_plusplus
from dq.cluster.online import clvq, minibatch
from dq.cluster.transport import barycentre, exact_plan, sinkhorn_plan, uniform_w2

__all__ = [
    "Clustering",
    "barycentre",
    "choose_engine",
    "clvq",
    "exact_plan",
    "kmeans",
    "kmeans_many",
    "kmeans_plusplus",
    "minibatch",
    "nearest",
    "quantization_stats",
    "sinkhorn_plan",
    "uniform_w2",
]
