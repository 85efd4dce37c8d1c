"""What `scripts/train_mini.py` is made of: drawings, tokenizers, the stages of training, and the judge."""
