"""Ground: messages and exit status, the one error that means bad input, files written whole or not at all."""
