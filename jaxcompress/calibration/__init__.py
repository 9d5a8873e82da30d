"""Calibration: statistics of each kernel's inputs and outputs on real batches."""
