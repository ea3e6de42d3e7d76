"""Programs on the public API: thin, and each usable from Python too."""
