"""What `scripts/train_mini.py` is made of: drawings, tokenizers, the two training stages, and the judge."""
