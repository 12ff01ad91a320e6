"""Serve subscribers from feeds of sessions."""
