"""The same engine on virtual time: a clock that jumps, a machine that only spends seconds, and made-up traffic."""
