"""The parts of `bench/throughput.py --family` and `bench/prefix.py`: checkpoints, plain layers, the authors' loops."""
