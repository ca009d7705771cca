"""A data set's rows become prompts; an answer becomes a verdict."""
