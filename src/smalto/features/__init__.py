"""Frozen networks that losses and metrics look at pictures through. None of them is downloaded."""
