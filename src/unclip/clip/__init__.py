"""CLIP: its two encoders, tokenizer, image preprocessing and folders."""
