"""Several candidates that are adapters of one base, scored in the same batches."""
