"""The architecture: sizes, weights by role, the forward pass as a description."""
