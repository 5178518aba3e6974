"""The networks that Motus stands on, and the reading and writing of their published weights."""
