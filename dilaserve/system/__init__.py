"""What this process has from its operating system: memory, cores, files, signals, children."""
