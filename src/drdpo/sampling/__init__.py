"""Step 1a: prompts in, completions out."""
