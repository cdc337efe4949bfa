"""Models on disk: references, checkpoints, architectures, tokenizers and checksums."""
