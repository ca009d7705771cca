"""How many directions a bucket's gradients span, and whether buckets share them."""
