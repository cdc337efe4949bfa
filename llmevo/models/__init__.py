"""What lies on disk: references to models, checkpoints, layers, weights, tokenizers and checksums."""
