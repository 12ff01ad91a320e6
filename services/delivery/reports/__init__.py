"""What was delivered, counted for billing."""
