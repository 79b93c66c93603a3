"""Triton kernels and their launchers, nothing else. Imported lazily, by the one place that decides to use each."""
