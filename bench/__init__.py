"""Measurements: what is run, and the results that are committed under bench/results/<device>/."""
