"""Parts of `bench/train_tiny.py`: how the bundled model is made."""
