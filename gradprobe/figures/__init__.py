"""One look for all figures, a module for each experiment, and the report."""

import os
import sys

# Figures are drawn on Agg canvases, whatever backend a notebook has left in the environment: where that is not
# installed, matplotlib can't even be imported. Every module here comes after this one.
if "matplotlib" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"
