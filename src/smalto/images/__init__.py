"""Where images come from: folders, archives, parquet, packages; reading, cutting and batching
them.
"""
