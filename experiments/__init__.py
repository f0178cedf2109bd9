"""One question per script: `scripts/run NAME` or `python -m experiments.NAME`."""
