"""Step 1a: sample completions of prompts with vLLM or transformers."""
