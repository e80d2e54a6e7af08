"""Files on disk: read, refused, laid out and written, byte by byte."""
