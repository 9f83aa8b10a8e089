"""Kernels of the training step. Shape suffixes: N answer tokens, D width, V vocabulary, K columns of a block of it."""

from drdpo.kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
