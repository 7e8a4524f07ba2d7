"""Checkpoints on disk: bytes and hashes. No tensors, no CUDA, no HTTP, nothing of the engine.

The front door is `checkpoint_cache.CheckpointCache`; README.md has the format and the threads.
"""
