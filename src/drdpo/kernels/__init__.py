"""Kernels of the training step. Shape suffixes: N answer tokens, D width, V vocabulary, C tokens of one chunk."""

from drdpo.kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
