"""What the race of the ops measures: cases, inputs, exact results, and everyone who computes them."""
