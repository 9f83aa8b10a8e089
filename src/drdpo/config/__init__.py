"""One frozen dataclass per step IS the command line of that step. A step loads its own file only."""
