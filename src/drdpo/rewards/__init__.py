"""Steps 1b and 2: ArmoRM, scoring, the arithmetic of scores, preference pairs."""
