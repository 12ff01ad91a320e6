"""Reading sessions from the log."""
