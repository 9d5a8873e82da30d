"""Planners: one budget in, one recipe of Python numbers out."""
