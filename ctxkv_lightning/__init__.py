"""Context-KV Lightning."""
