"""Accept, look up and delete generations."""
