"""The card, its memory, and compiled kernels, through cuda-python."""
