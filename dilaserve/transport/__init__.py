"""What lies between the engine and its workers: shared memory, and the frames on their sockets."""
