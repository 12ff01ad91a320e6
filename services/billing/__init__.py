"""Billing: settles every generation of the log against its provider report, and serves the usage."""
