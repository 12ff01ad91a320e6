"""Feeds of sessions, and the subscribers that they serve."""
