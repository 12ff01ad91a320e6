"""Encode events for clients, without I/O and without a clock."""
