"""The characters of `st.text()`, which finds out what UTF-8 holds by encoding each of a million of them."""

from hypothesis import strategies as st

ALL = st.characters(exclude_categories=["Cs"])  # all but surrogates
