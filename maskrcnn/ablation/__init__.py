"""Ablations: train variants of one experiment, and say what each did to the AP, and how surely.

`plan` reads the YAML and checks every run before the first step, `runner` trains what is missing, `results` measures
and compares, and `report` writes it down.
"""
