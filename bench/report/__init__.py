"""The report of a run: the same tables as one HTML page, as Markdown and, in short, for a terminal."""
