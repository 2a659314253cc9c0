"""Errors, settings, files, devices and processes, for use by every other folder.

Nothing here depends on images or models.
"""
