"""Delivery: replays and fans out session logs to any number of clients."""
