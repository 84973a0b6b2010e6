"""Pure judgements: no device, no clock, no randomness, no memory."""
