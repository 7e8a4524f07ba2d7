"""The devices: one interface, the NumPy reference and CUDA."""
