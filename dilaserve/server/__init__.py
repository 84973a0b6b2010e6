"""The server speaks HTTP to the world and knows only the engine."""
