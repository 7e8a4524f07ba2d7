"""CUDA kernels and their launchers; a leaf that knows arrays, and nothing of models or requests."""
