"""drdpo: LLM alignment by distributionally robust direct preference optimization (arXiv 2502.01930)."""
