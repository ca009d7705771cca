"""A checkpoint becomes a model: where its weights lie, its layers and two halves, batches that fit memory."""
