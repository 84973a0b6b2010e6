"""The parts of `bench/soak.py`: a server watched from outside, what is done to it, and how its answers are judged."""
