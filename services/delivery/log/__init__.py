"""Read sessions from the log."""
