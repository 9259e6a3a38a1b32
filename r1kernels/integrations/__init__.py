"""Thin adapters that put r1kernels under other libraries; each module needs its library and imports it itself."""
