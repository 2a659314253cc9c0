"""A tokenizer as jobs run it: precision, batching, threads."""
