"""What the tokenizer is made of."""
