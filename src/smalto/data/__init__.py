"""Pictures in, tokens out: folders, decoding, crops, and the file that holds tokens."""
