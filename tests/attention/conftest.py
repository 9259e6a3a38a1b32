"""Tests of attention ops run on each backend that tests.support.backends names."""

from tests.support.backends import backend as backend
