"""Step 3: data, batches, losses, policy, reference log-probs, checkpoints, loop."""
