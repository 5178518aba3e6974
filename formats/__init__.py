"""Formats that episodes are stored in: LeRobot's, official Motus folders and plain videos, behind
one reader (`recordings.Recordings`)."""
