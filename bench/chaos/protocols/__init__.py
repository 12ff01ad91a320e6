"""Reading one connection, a module for each kind of wire."""
