"""One look for all figures, a module for each experiment, and the report."""
