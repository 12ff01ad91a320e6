"""Run everything in one process tree: embedded nats-server, SQLite, the three services and the command line."""
