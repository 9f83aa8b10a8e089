"""Expected scores of policies on a fixed set of scored completions: see drdpo.candidates."""

from drdpo.candidates import values as values
