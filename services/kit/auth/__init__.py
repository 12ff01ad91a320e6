"""Authentication and authorization: credentials of every kind become one `Principal`."""
