"""Worlds to act in: the toy tabletop, and real simulators behind the same few methods."""
