"""What every other folder may use: errors, settings, files, devices, processes. Nothing of images or models."""
