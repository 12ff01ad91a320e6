"""Who calls, and what they may do: credentials of every kind become one `Principal`."""
