"""A site of the Flower App; the code is what is installed there."""

from experiments.federation.flower import client_app as app

__all__ = ['app']
