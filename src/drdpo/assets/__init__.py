"""Step 0: models and prompts, from the package index (the embedded default) and from the hub."""
