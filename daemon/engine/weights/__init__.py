"""From a GGUF file to a model's weights."""
