"""Intentional design: see, judge, shape and audit what a network learns."""
