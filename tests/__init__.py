"""Tests of fastopt: `optimizers.py` is the table they all go through, `reference.py` what they compare with."""
