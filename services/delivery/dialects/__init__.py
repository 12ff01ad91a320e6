"""The shapes in which a log is shown; one module a dialect."""
