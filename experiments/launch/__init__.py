"""Launchers for several hosts, and their rehearsal on one machine."""
