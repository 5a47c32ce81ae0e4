"""Measurements: both sides of every ratio interleaved in one process, medians, warm-up first."""
