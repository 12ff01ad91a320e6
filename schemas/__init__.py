"""Contracts between Tailrace processes: events, codec, acceptance rule, subjects, topology, cursors.

Nothing in this package performs I/O or reads a clock.
"""
