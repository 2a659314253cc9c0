"""Frozen networks for perceptual losses and metrics. None of them is downloaded."""
