"""Runs steps for the engine: one worker process per device."""
