"""Measurements: they find out how fast things are, and say where and with what."""
