"""The wire of gRPC: `tailrace/v1/tailrace.proto`, and what protoc makes of it for Python."""
