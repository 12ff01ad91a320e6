"""Billing's connections to the outside: the log and the database."""
