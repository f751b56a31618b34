"""Pallas kernels, one folder per operation; each folder is usable alone."""
