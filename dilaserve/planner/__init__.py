"""Which plan the traffic wants: how many instances of which tensor-parallel degree, and when to change."""
