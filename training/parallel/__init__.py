"""Several processes in one run: `ranks` is what they do together, `launch` how they start and end."""
