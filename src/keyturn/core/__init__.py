"""WHAT a rotation is: pure values and decisions, without clock, randomness or I/O."""
