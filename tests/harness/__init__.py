"""What the tests share: scripts in forks of one warm process, small data, and stand-ins for the programs of a cluster."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
