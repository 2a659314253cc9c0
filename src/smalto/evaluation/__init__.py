"""What is measured of a tokenizer, and how it is shown."""
