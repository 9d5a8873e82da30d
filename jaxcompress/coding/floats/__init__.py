"""Floating-point arrays, bit for bit."""
