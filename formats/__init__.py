"""Formats that episodes are stored in: LeRobot's and the official Motus folders, behind one reader
(`recordings.Recordings`)."""
