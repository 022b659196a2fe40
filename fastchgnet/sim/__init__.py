"""Simulation: the ASE calculator."""
