"""Taking, looking up and deleting generations."""
