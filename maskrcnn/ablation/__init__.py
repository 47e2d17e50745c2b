"""Ablations: train variants of one experiment and report how each changes the AP, with confidence intervals.

`plan` reads the YAML and checks every run before training starts. `runner` trains the runs that are missing. `results`
evaluates the runs and compares the variants. `report` writes the report.
"""
