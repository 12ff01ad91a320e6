"""Billing's adapters: the log and the database."""
