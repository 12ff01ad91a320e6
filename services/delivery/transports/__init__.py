"""The ways by which frames reach a client; one module a protocol."""
