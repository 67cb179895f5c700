"""Shipped for authors of adapters: the contract suite and the fakes that pass it."""
