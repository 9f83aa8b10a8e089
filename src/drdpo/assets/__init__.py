"""Step 0: models and prompts, embedded or from the hub."""
