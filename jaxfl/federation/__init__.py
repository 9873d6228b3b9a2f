"""Real clients over a network, on NATS JetStream: see docs/federation.md."""
