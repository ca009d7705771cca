"""Where responses come from: sampled here, asked of a server, read from other tools' files; and their scores."""
