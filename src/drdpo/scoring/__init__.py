"""Step 1b: completions in, scores out."""
