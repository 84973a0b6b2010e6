"""The parts of `bench/train_tiny.py`: tokenizer, lessons, network, optimiser, training run and checkpoint."""
