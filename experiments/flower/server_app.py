"""The server of the Flower App; the code is what is installed there."""

from experiments.federation.flower import server_app as app

__all__ = ['app']
