"""qwend: serve Qwen 3.5 from a GGUF file to coding agents, resuming from checkpoints."""

__version__ = "0.1.0"
