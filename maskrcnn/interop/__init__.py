"""Weights of other frameworks: recognised by their names, converted to this model, with a certificate; and out again.

Start reading at `conversion.py`. A framework's file is described in `layouts.py`, as data.
"""
