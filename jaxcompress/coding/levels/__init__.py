"""Levels of rate-distortion quantization near their entropy, with the trellis."""
