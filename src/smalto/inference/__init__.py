"""Tokenizers for inference: device, precision and batch size."""
