"""Frozen networks that losses and metrics look at images through. None of them is downloaded."""
