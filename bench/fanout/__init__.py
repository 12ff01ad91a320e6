"""Many subscribers on one log: what delivery costs an event, how late events are, and what a subscriber takes."""
