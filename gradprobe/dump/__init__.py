"""The contract on disk: records, format, buckets, gradients read in blocks and grown row by row, checks."""
