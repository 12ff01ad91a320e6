"""Count delivered events for billing."""
