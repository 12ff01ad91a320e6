"""Billing: reading the log, and answering about usage."""
