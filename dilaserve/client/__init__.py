"""Programs that ask a server over HTTP: a chat in the terminal, and load. Knows no engine."""
