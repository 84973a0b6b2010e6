"""The parts of `bench/slo.py`: the systems, the load, the statistics, the tables and the plot."""
