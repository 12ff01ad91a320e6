"""Packages of the protocol, as protoc lays them out."""
